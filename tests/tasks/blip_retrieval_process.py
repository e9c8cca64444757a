"""Two processes that train BLIP on shares of batches."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from tests.tasks.group import in_group
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


def work(rank, folder):
    def wrap(model):
        return DistributedDataParallel(model, find_unused_parameters=True)

    for name, (_, _, shares) in CASES.items():
        found = steps(folder / f"{name}-data-{rank}", name, shares[rank], wrap)
        torch.save(found, folder / f"{name}-{rank}.pt")


if __name__ == "__main__":
    sys.exit(any(in_group(work, Path(sys.argv[1]))))
