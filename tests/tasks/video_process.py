"""Batches of videos that two processes share."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from tests.tasks import test_video_qa, test_video_retrieval
from tests.tasks.group import in_group

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


def work(rank, folder):
    for kind in ("video_retrieval", "video_qa"):
        own = folder / f"{kind}-data-{rank}"
        own.mkdir()
        task, model = make(kind, own)
        wrapped = DistributedDataParallel(model)  # must outlive the backward pass
        loss, _ = task.loss(wrapped, batch_of(task, SHARES[rank]))
        loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        torch.save({"loss": loss.detach(), "gradients": found}, folder / f"{kind}-{rank}.pt")


if __name__ == "__main__":
    sys.exit(any(in_group(work, Path(sys.argv[1]))))
