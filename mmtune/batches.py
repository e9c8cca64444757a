"""The order of training samples: a function of (seed, epoch), divided among processes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from mmtune.checkpoints import TrainingError


class EpochBatches(Sampler[list[int]]):
    """Batches of sample indices, one order per (seed, epoch), divided among processes.

    Every process makes the same permutation and takes its own batches, so that w processes of
    batch b see together what one process of batch w * b sees.

    Args:
        count: samples in the data set.
        batch_size: samples per process and batch.
        seed: with the epoch, decides the order.
        rank: this process.
        world: number of processes.
        drop_last: leave out the last samples where they do not fill world * batch_size; otherwise
            they are divided evenly, filled up from the start of the order.

    Raises:
        TrainingError: no batch can be made.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, rank: int, world: int, drop_last: bool
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world, self.drop_last = rank, world, drop_last
        self.epoch = 0
        if len(self) == 0:
            raise TrainingError(
                f"the training split has {count} samples, fewer than one batch of "
                f"{batch_size} on each of {world} processes. Lower training.batch_size, or set "
                "training.drop_last: false."
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of `epoch` for the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        together = self.batch_size * self.world
        return self.count // together if self.drop_last else math.ceil(self.count / together)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.count, generator=generator).tolist()
        together = self.batch_size * self.world
        for start in range(0, len(self) * together, together):
            chunk = order[start : start + together]
            while len(chunk) % self.world:
                chunk += order[: self.world - len(chunk) % self.world]
            share = len(chunk) // self.world
            yield chunk[self.rank * share : (self.rank + 1) * share]
