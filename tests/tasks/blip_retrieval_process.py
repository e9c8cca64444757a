"""One of several processes that train BLIP on shares of batches: rank, world, folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mmtune.device import leave_together
from tests.tasks.tiny_blip import adapted, batch_of, make_task, trained_parameters

# name -> (method, its options, pairs of each of two processes in three steps)
# Even pairs have six tokens and odd ones five, so processes differ in width too.
CASES = {
    "lora": ("lora", {"rank": 4}, ([1, 3, 5], [0, 2, 6, 8, 10])),
    "aurora": ("aurora", {"rank": 4, "context": "batch"}, ([0, 5, 9, 14], [2, 4, 7, 13])),
}
STEPS = 3


def steps(folder, name, share, wrap=lambda model: model):
    """Three steps of plain gradient descent; what each process must know alike, and its losses."""
    method, options, _ = CASES[name]
    folder.mkdir()
    task = make_task(folder, queue=11, momentum=0.9)
    model = adapted(task, method, **options)
    hooks = task.hooks(model, STEPS)
    wrapped = wrap(model.train())
    optimiser = torch.optim.SGD(trained_parameters(model).values(), lr=0.1)
    losses = []
    for step in range(1, STEPS + 1):
        hooks.before_step(step)
        loss, numbers = task.loss(wrapped, batch_of(task, [(i + step) % 16 for i in share]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        hooks.after_step(step)
        losses.append([float(loss), float(numbers["itm"])])
    gradients = {n: p.grad for n, p in trained_parameters(model).items()}
    return {"losses": torch.tensor(losses), "gradients": gradients, "state": hooks.state_dict()}


def main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world
    )

    def wrap(model):
        return DistributedDataParallel(model, find_unused_parameters=True)

    for name, (_, _, shares) in CASES.items():
        found = steps(folder / f"{name}-data-{rank}", name, shares[rank], wrap)
        torch.save(found, folder / f"{name}-{rank}.pt")
    leave_together()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
