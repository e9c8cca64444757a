"""CLIP's activation: the numbers of the stock modules, and less that is kept."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.activations import QuickGELUActivation

from mmtune.backbones import backbone_of
from mmtune.backbones.quick_gelu import QuickGelu, quicken, slow
from mmtune.conformance.backbones import build, images_and_texts

STOCK = QuickGELUActivation()


def result(module, x):
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(torch.linspace(-2, 3, y.numel(), dtype=y.dtype).view_as(y))
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 7, 64), (5,), (0, 4), ()])
def test_values_and_gradients_have_the_bits_of_the_stock_module(dtype, shape):
    x = (4 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    for found, wanted in zip(result(QuickGelu(STOCK), x), result(STOCK, x), strict=True):
        assert torch.equal(found, wanted)


def test_gradients_of_gradients():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(QuickGelu(STOCK), x)
    assert torch.autograd.gradgradcheck(QuickGelu(STOCK), x)


def test_only_the_input_is_kept():
    kept = []
    x = torch.randn(6, requires_grad=True)
    with saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda t: t):
        QuickGelu(STOCK)(x)
    assert kept == [x.data_ptr()]


def test_it_compiles_in_one_graph():
    x = torch.randn(4, 8)
    compiled = torch.compile(QuickGelu(STOCK), fullgraph=True, backend="aot_eager")
    for found, wanted in zip(result(compiled, x), result(STOCK, x), strict=True):
        assert torch.equal(found, wanted)


def step(model, view):
    pairs = view.embed_pairs(model, images_and_texts(0, 4))
    (pairs.image * pairs.text).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for p in model.parameters():
        p.grad = None
    return [pairs.image, pairs.text, *gradients]


def activations(model):
    return [type(m).__name__ for m in model.modules() if "gelu" in type(m).__name__.lower()]


def test_a_prepared_clip_computes_the_same_bits_and_is_restored():
    model = build("clip").requires_grad_(True)
    stock = copy.deepcopy(model)
    view, kinds = backbone_of(model), activations(model)
    assert set(kinds) == {"QuickGELUActivation"}
    view.prepare()
    assert activations(model) == ["QuickGelu"] * len(kinds)
    wanted = step(stock, backbone_of(stock))
    for found in (step(model, view), step(copy.deepcopy(model), view)):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    view.restore()
    assert activations(model) == kinds
    assert [n for n, _ in model.named_modules()] == [n for n, _ in stock.named_modules()]


def test_what_is_no_plain_stock_module_stays():
    watched = QuickGELUActivation()
    watched.register_forward_hook(lambda *_: None)

    class Own(QuickGELUActivation):
        pass

    model = nn.Sequential(watched, Own(), nn.GELU(), QuickGELUActivation()).eval()
    quicken(model)
    assert [type(m) for m in model] == [QuickGELUActivation, Own, nn.GELU, QuickGelu]
    assert not model[3].training
    quicken(model)
    assert isinstance(model[3].stock, QuickGELUActivation)
    slow(model)
    assert [type(m) for m in model] == [QuickGELUActivation, Own, nn.GELU, QuickGELUActivation]


def test_open_clip_too():
    from open_clip.transformer import QuickGELU

    model = nn.Sequential(QuickGELU())
    quicken(model)
    assert isinstance(model[0], QuickGelu)
    x = torch.randn(9)
    assert torch.equal(model(x), QuickGELU()(x))
