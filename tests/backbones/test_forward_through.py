"""A computation that the stock forward does not offer still is one forward pass of the wrappers."""

import pytest
import torch
from torch import nn

from mmtune.backbones.base import forward_through


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.inner(*args, **kwargs)


def test_the_computation_runs_inside_every_wrapper_and_the_stock_forward_comes_back():
    stock = nn.Linear(3, 2)
    seen = []
    stock.register_forward_hook(lambda module, args, out: seen.append(out))
    outer = Wrapper(Wrapper(stock))
    x = torch.randn(4, 3)
    parts = forward_through(outer, stock, lambda x, scale: (scale * x.sum(), x), x, scale=2.0)
    assert torch.equal(parts[0], 2 * x.sum())
    assert outer.calls == outer.inner.calls == 1
    assert seen == [parts]
    assert torch.equal(outer(x), nn.functional.linear(x, stock.weight, stock.bias))
    assert "forward" not in vars(stock)


def test_an_error_inside_leaves_the_model_as_it_was():
    stock = nn.Linear(3, 2)

    def patched(x):
        return x

    stock.forward = patched

    def fails(x):
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        forward_through(Wrapper(stock), stock, fails, torch.zeros(1, 3))
    assert stock.forward is patched
