"""The kernel of CLIP's activation, for every number that there is."""

import pytest
import torch
from transformers.activations import QuickGELUActivation

from mmtune.backbones.quick_gelu import QuickGelu, _kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STOCK = QuickGELUActivation()


def every(dtype):
    """Every finite number of 16 bits, or 2^22 of them."""
    if dtype == torch.float32:
        return 8 * torch.randn(2**22, device="cuda")
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16, device="cuda").view(dtype)
    return x[x.isfinite()]


def result(module, x, dy):
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(dy)
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_kernel_gives_the_stock_bits_and_a_better_gradient(dtype):
    assert _kernels(torch.device("cuda", 0)) is not None
    x = every(dtype)
    dy = torch.randn_like(x, dtype=torch.float32).to(dtype)
    y, dx = result(QuickGelu(STOCK), x, dy)
    wanted, stock_dx = result(STOCK, x, dy)
    assert torch.equal(y, wanted)
    sane = x.abs() < 1e3  # beyond, products overflow in float16
    exact = result(STOCK, x.double(), dy.double())[1][sane]
    error, stock_error = ((d[sane].double() - exact).norm() for d in (dx, stock_dx))
    assert dtype == torch.float32 or error <= stock_error  # the stock one rounds after each step
    assert error / exact.norm() < {torch.float32: 1e-6, torch.float16: 1e-3}.get(dtype, 4e-3)


def test_views_and_nothing():
    x = torch.randn(64, 3, 40, device="cuda", dtype=torch.bfloat16)
    for part in (x.transpose(0, 2), x[:, 1], x[:0]):
        dy = torch.ones_like(part)
        assert torch.equal(result(QuickGelu(STOCK), part, dy)[0], STOCK(part))


def test_gradients_of_gradients_are_those_of_the_formula():
    x = torch.randn(9, device="cuda", requires_grad=True)
    (once,) = torch.autograd.grad(QuickGelu(STOCK)(x).sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(once.sum(), x)
    (wanted,) = torch.autograd.grad(STOCK(x).sum(), x, create_graph=True)
    assert torch.equal(twice, torch.autograd.grad(wanted.sum(), x)[0])
