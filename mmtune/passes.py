"""Forward and backward passes over batches, sent to a CUDA device as a whole once recorded.

A step of many small kernels waits for Python, which launches them one by one; a CUDA graph is
launched at once. Each shape of batch has a recording of its own: its first pass is plain, its
second looks for what cannot be recorded, its third is recorded, and later ones are replayed. What
the host asks the device for in a pass is answered as in the recording and asked again on the device
(see `mmtune.replayed`); a pass in which an answer would be another is made plainly, as are all of
its shape from there on.
"""

from __future__ import annotations

import gc
import logging
import os
import traceback
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmtune import questions
from mmtune.device import Fetched
from mmtune.questions import Questions
from mmtune.replayed import capture, recording, trial

log = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]
Numbers = Mapping[str, "Tensor | float"]
SHAPES = 16  # that are recorded: each keeps a copy of its batch; the rest of memory is shared


@dataclass(frozen=True)
class _Recording:
    batch: Batch
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    loss: Tensor
    numbers: Numbers
    right: Tensor
    gradients: list[Tensor | None]


class Passes:
    """Makes passes; on a CUDA device they are replayed where they can be.

    A replayed pass computes with the same kernels as a plain one, and gives the same bits. What
    Python does in a pass is done while recording alone: it must not change from pass to pass.

    Args:
        forward: (batch, *constants) -> the loss, and what else is to be known.
        backward: sets gradients, given the loss.
        parameters: those that train; they stay where they are in memory.
        device: where all is.
        accumulates: whether gradients of several passes are added; if not, all are None before each
            pass, and afterwards belong to the recording.
        replays: False keeps all passes plain.

    Attributes:
        replayed: how many passes were.
    """

    def __init__(
        self,
        forward: Callable[..., tuple[Tensor, Numbers]],
        backward: Callable[[Tensor], object],
        parameters: Iterable[nn.Parameter],
        device: torch.device,
        accumulates: bool = False,
        replays: bool = True,
    ) -> None:
        self._forward, self._backward = forward, backward
        self._parameters, self._device = list(parameters), device
        self._accumulates = accumulates
        self._recordable = replays and device.type == "cuda"
        self._counts: Counter[Hashable] = Counter()
        self._answers: dict[Hashable, list[Any]] = {}
        self._recordings: dict[Hashable, _Recording] = {}
        self.replayed = 0

    def __call__(self, batch: Batch, *constants: Hashable) -> tuple[Tensor, dict[str, float]]:
        """Add a batch's gradients to those that are there.

        Args:
            batch: on the device.
            constants: given to `forward`; another value needs another recording.

        Returns:
            (the loss, what else was to be known, with the loss as "loss"). For the latter the
            device is waited for when backward is on its way to it.
        """
        shapes = tuple((name, value.shape, value.dtype) for name, value in batch.items())
        key = (shapes, constants)
        self._counts[key] += 1
        first = all(p.grad is None for p in self._parameters)
        if self._recordable and first and self._counts[key] > 1 and key not in self._recordings:
            if key in self._answers:
                self._record(key, batch, constants)
            elif len(self._answers) < SHAPES:
                found = self._try(key, batch, constants)
                if found is not None:
                    return found
        if key in self._recordings:
            found = self._replay(key, batch)
            if found is not None:
                return found
        return self._plain(batch, constants)

    def _plain(self, batch: Batch, constants: Any) -> tuple[Tensor, dict[str, float]]:
        loss, numbers = self._forward(batch, *constants)
        fetched = Fetched(loss, numbers.values())
        self._backward(loss)
        return loss.detach(), _named(numbers, fetched)

    def _try(
        self, key: Hashable, batch: Batch, constants: Any
    ) -> tuple[Tensor, dict[str, float]] | None:
        """A plain pass that notes what is asked; None where it does what cannot be recorded."""
        before = torch.cuda.get_rng_state(self._device)
        try:
            with trial(self._device) as asked:
                loss, numbers = self._forward(batch, *constants)
                answers = list(asked.answers)
                self._backward(loss)
                if len(asked.answers) > len(answers):
                    raise RuntimeError("the backward pass asks the device for a number")
                fetched = Fetched(loss, numbers.values())
        except RuntimeError as error:  # the plain pass that follows says what else may be wrong
            self._give_up(error)
            torch.cuda.set_rng_state(before, self._device)
            for p in self._parameters:
                p.grad = None
            return None
        self._answers[key] = answers
        return loss.detach(), _named(numbers, fetched)

    def _record(self, key: Hashable, batch: Batch, constants: Any) -> None:
        kept = {name: value.clone() for name, value in batch.items()}
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # All share their memory: a pass is over before another begins.
        pool = next((r.forward.pool() for r in self._recordings.values()), None)
        gc.collect()  # what is freed while recording could belong to another recording
        torch.cuda.empty_cache()  # what plain passes left is no use to recordings
        try:
            with recording(self._device):
                with capture(forward, pool), Questions(self._device, self._answers[key]) as asked:
                    loss, numbers = self._forward(kept, *constants)
                    right = asked.right().squeeze()
                with capture(backward, forward.pool()), Questions(self._device, []):
                    self._backward(loss)
        except RuntimeError as error:
            self._give_up(error)
        else:
            gradients = [p.grad for p in self._parameters]
            self._recordings[key] = _Recording(
                kept, forward, backward, loss.detach(), numbers, right, gradients
            )
        for p in self._parameters:
            p.grad = None

    def _replay(self, key: Hashable, batch: Batch) -> tuple[Tensor, dict[str, float]] | None:
        """None where an answer would have been another; then nothing was done."""
        found = self._recordings[key]
        before = torch.cuda.get_rng_state(self._device) if self._answers[key] else None
        for name, value in found.batch.items():
            value.copy_(batch[name], non_blocking=True)
        found.forward.replay()
        fetched = Fetched(found.loss, [*found.numbers.values(), found.right])
        found.backward.replay()
        numbers = _named({**found.numbers, "right": found.right}, fetched)
        if not numbers.pop("right"):
            self._give_up("what the host asks the device for changes from batch to batch", key)
            if before is not None:
                torch.cuda.set_rng_state(before, self._device)
            return None
        for p, gradient in zip(self._parameters, found.gradients, strict=True):
            if gradient is not None and p.grad is not None:
                p.grad += gradient
            elif gradient is not None:  # the next replay writes over the recording's own
                p.grad = gradient.clone() if self._accumulates else gradient
        self.replayed += 1
        return found.loss.clone(), numbers

    def _give_up(self, why: object, key: Hashable = None) -> None:
        at = ""
        if isinstance(why, BaseException):
            inner = (os.path.dirname(torch.__file__), questions.__file__)
            frames = traceback.extract_tb(why.__traceback__)
            last = [f for f in frames if not f.filename.startswith(inner)][-1]
            at = f" ({last.filename}:{last.lineno}: {last.line})"
        log.warning("passes are made plainly from now on, not replayed: %s%s", why, at)
        self._recordable = False
        self._recordings.pop(key, None)


def _named(numbers: Numbers, fetched: Fetched) -> dict[str, float]:
    return dict(zip(("loss", *numbers), fetched.values(), strict=True))
