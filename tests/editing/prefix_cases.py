"""Places of edits in the tiny models, other weights for them, and what is compared."""

from __future__ import annotations

from functools import cache

import torch

from editing.changes import Delta
from editing.regions import Region, parameters_of
from editing.weight_edits import WeightEdit
from tests.editing.tiny import drawn, tiny

FEW = 3  # tokens are enough to see what the prompt's keys and values do
# Region -> its place, and where it is.
PLACES = {
    "last MLP": Region(("language",), ("fc1", "fc2"), "last:1"),
    "last fc2 with bias": Region(("language",), ("fc2",), "last:1", biases=True),
    "last attention": Region(("language",), ("q", "v"), "last:1"),
    "first language layer": Region(("language",), ("fc2", "out"), "first:1"),
    "head": Region(("language",), ("head",)),
    "norms": Region(("language",), ("norm",), "last:1"),
    "last vision layer": Region(("vision",), ("fc1", "fc2"), "last:1"),
    "first vision layer": Region(("vision",), ("k",), "first:1"),
    "projector": Region(("projector",), ("head",)),
    "Q-Former": Region(("fusion",), ("fc2", "cross_v"), "last:1"),
    "vision and language": Region(("vision", "language"), ("fc2",), "last:1"),
    "T5's encoder": Region(("language",), ("fc1", "fc2"), (1,)),
}


@cache
def shared(name):
    """A model for tests that leave it as it was, which they assert by comparing with it."""
    return tiny(name)


def few(mllm, batch, weights=None):
    return mllm.answer(batch, FEW, weights)


def place(mllm, region):
    return {n: p.detach() for n, p in parameters_of(mllm.backbone, PLACES[region]).items()}


def moved(weights, seed, size=0.3):
    """Other weights, near enough that the model still depends on what it reads."""
    return {
        name: (w + size * w.float().std() * drawn(w.shape, seed + i).to(w.device)).to(w.dtype)
        for i, (name, w) in enumerate(weights.items())
    }


def edit_of(mllm, weights, seed):
    changes = {n: Delta(w - weights[n]) for n, w in moved(weights, seed).items()}
    return WeightEdit.of(mllm, changes)


def gradients(mllm, batch, weights):
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    with torch.enable_grad():
        loss = mllm.nll(batch, leaves).sum()
    return torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)


def same(found, want):
    return all(
        a is b if a is None or b is None else torch.equal(a, b)
        for a, b in zip(found, want, strict=True)
    )
