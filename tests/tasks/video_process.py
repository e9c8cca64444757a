"""Batches of videos that two processes share: forks of one process, whose start is slow."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mmtune.device import leave_together
from tests.tasks import test_video_qa, test_video_retrieval
from tests.tasks.text_process import forked, status

SHARES = ([0, 1, 2, 3, 4], [5, 6, 7])  # samples of each process


def make(kind, folder):
    """A task on videos in `folder`, and its model with an adapter that is not zero."""
    if kind == "video_qa":
        task = test_video_qa.make_task(folder)
        model = test_video_qa.wrapped(task)
        torch.manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.05)
        return task, model
    task = test_video_retrieval.make_task(folder)
    return task, test_video_retrieval.small_adapter(task)


def batch_of(task, indices):
    return task.collate([task.train_dataset[i] for i in indices])


def share(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    for kind in ("video_retrieval", "video_qa"):
        own = folder / f"{kind}-data-{rank}"
        own.mkdir()
        task, model = make(kind, own)
        wrapped = DistributedDataParallel(model)  # must outlive the backward pass
        loss, _ = task.loss(wrapped, batch_of(task, SHARES[rank]))
        loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        torch.save({"loss": loss.detach(), "gradients": found}, folder / f"{kind}-{rank}.pt")
    leave_together()


if __name__ == "__main__":
    torch.set_num_threads(1)
    to = Path(sys.argv[1])
    ranks = [forked(share, rank, to) for rank in range(2)]
    (to / "status.json").write_text(json.dumps([status(child) for child in ranks]))
