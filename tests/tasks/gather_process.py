"""Two processes that compute losses over divided batches."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from tests.tasks.group import in_group
from tests.tasks.two_towers import CASES, TwoTowers, case_loss, share


def work(rank, folder):
    for name in CASES:
        model = DistributedDataParallel(TwoTowers())
        loss = case_loss(model, share(name, rank), name)
        loss.backward()
        found = {n: p.grad for n, p in model.module.named_parameters()}
        torch.save({"loss": loss.detach(), **found}, folder / f"{name}-{rank}.pt")


if __name__ == "__main__":
    sys.exit(any(in_group(work, Path(sys.argv[1]))))
