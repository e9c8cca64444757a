"""One of several processes that compute a loss over a divided batch: rank, world, folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mmtune.device import leave_together
from tests.tasks.two_towers import CASES, TwoTowers, case_loss, share


def main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world
    )
    for name in CASES:
        model = DistributedDataParallel(TwoTowers())
        loss = case_loss(model, share(name, rank, world), name)
        loss.backward()
        found = {n: p.grad for n, p in model.module.named_parameters()}
        torch.save({"loss": loss.detach(), **found}, folder / f"{name}-{rank}.pt")
    leave_together()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
