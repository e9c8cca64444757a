"""Gradients of an editor's losses in its network, against finite differences in float64."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from tests.editing.meta_records import random_records


@contextmanager
def all_float64():
    """Stock models compute norms and attention in float32, whatever their weights are."""
    kept = torch.float32, torch.Tensor.float
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.Tensor.float = kept


@all_float64()
def assert_meta_gradients(editor, mllm, network, rates=()):
    """Along a random direction for each tensor of the network.

    Args:
        editor: a trained editor whose losses are checked.
        mllm: in float64.
        network: as it begins.
        rates: tensors that are small, and must be moved by less.
    """
    records = random_records(2)
    network = network.double().train()
    editor.losses(mllm, network, records, torch.Generator())  # fills running statistics
    network.eval()
    generator = torch.Generator().manual_seed(1)
    draw = lambda value: torch.randn(value.shape, generator=generator, dtype=value.dtype)  # noqa: E731
    with torch.no_grad():  # away from where a max or a zero would hide something
        for name, value in network.named_parameters():
            value += 0.05 * draw(value) * (name not in rates)

    def loss():
        return sum(editor.losses(mllm, network, records, torch.Generator()).values())

    loss().backward()
    for name, value in network.named_parameters():
        direction = draw(value)
        step = 1e-9 if name in rates else 1e-7  # longer ones cross where a max has its corner
        with torch.no_grad():
            value += step * direction
            above = loss()
            value -= 2 * step * direction
            below = loss()
            value += step * direction
        found, want = (value.grad * direction).sum(), (above - below) / (2 * step)
        torch.testing.assert_close(
            found, want, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert found != 0, name
