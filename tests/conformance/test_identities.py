"""The identities that every method keeps on every backbone."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file

from mmtune import load_adapter, merge
from mmtune.backbones import backbone_of
from mmtune.conformance.backbones import BACKBONES, build
from mmtune.conformance.methods import METHODS, PAIRS, PAIRWISE
from mmtune.tuners import registry

# Multimodal families that resemble one that is tried in full: by default the rows that differ most.
KIN = ("minigpt4", "llava-onevision", "qwen2.5-vl", "qwen2-vl", "qwen3-vl")
SHORT = [
    (method, backbone)
    for method in ("aurora", "lora", "adapter", "bitfit", "prefix", "prompt")
    for backbone in KIN[:3]
]
pytestmark = pytest.mark.parametrize(
    ("method", "backbone"),
    [
        pytest.param(*pair, marks=pytest.mark.slow if pair[1] in KIN and pair not in SHORT else ())
        for pair in PAIRS
    ],
)


def options(method, **changes):
    case = METHODS[method]
    return registry.method(case.method).options(**(case.settings | changes))


def count(method, backbone):
    return METHODS[method].count(BACKBONES[backbone].towers)


def adapt(method, backbone, dtype=torch.float32, seed=0, **changes):
    """A fresh adapter on a prepared backbone: (PeftModel, base model, backbone view)."""
    model = build(backbone).to(dtype)
    view = backbone_of(model)
    view.prepare()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = registry.apply(model, METHODS[method].method, options(method, **changes))
    return wrapped, model, view


def outputs(model, view, backbone, seed=0):
    """What the matrix's row says, as floats, for a batch in the model's dtype."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    inputs = BACKBONES[backbone].batch(seed, 3)
    inputs = inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}
    return BACKBONES[backbone].outputs(model, view, inputs)


def train(wrapped, view, backbone, steps=3, lr=1e-2):
    """A few AdamW steps towards noise; returns names that never got a finite gradient."""
    wrapped.train()
    parameters = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr)
    without = set(parameters)
    for step in range(steps):
        found = outputs(wrapped, view, backbone, step).float()
        target = torch.randn(found.shape, generator=torch.Generator().manual_seed(step))
        loss = (found - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if step < 2:
            for name, p in parameters.items():
                if p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0:
                    without.discard(name)
        optimizer.step()
    wrapped.eval()
    return without


def test_fresh_adapter_is_the_base_bit_for_bit_unless_it_says_otherwise(method, backbone):
    model = build(backbone)
    view = backbone_of(model)
    view.prepare()
    METHODS[method].base(model)
    with torch.no_grad():
        base = outputs(model, view, backbone)
        wrapped, _, view = adapt(method, backbone)
        fresh = outputs(wrapped.eval(), view, backbone)
    if METHODS[method].starts_at_base:
        assert torch.equal(fresh, base)
    else:
        assert fresh.isfinite().all()
        assert not torch.equal(fresh, base)


def test_count_is_the_closed_form(method, backbone):
    wrapped, _, _ = adapt(method, backbone)
    assert wrapped.get_nb_trainable_parameters()[0] == count(method, backbone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_training_moves_the_adapter_and_nothing_else(method, backbone, dtype):
    wrapped, _, view = adapt(method, backbone, dtype)
    frozen = {n: p.detach().clone() for n, p in wrapped.named_parameters() if not p.requires_grad}
    moving = {n: p.detach().clone() for n, p in wrapped.named_parameters() if p.requires_grad}
    buffers = {n: b.detach().clone() for n, b in wrapped.named_buffers()}
    idle = {n for n in moving if METHODS[method].idle and n.endswith(str(METHODS[method].idle))}
    assert train(wrapped, view, backbone) - idle == set()
    after = dict(wrapped.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in frozen.items())
    assert all(torch.equal(b, buffers[n]) for n, b in wrapped.named_buffers())
    assert all(not torch.equal(after[n], p) for n, p in moving.items() if n not in idle)
    assert all(after[n].dtype == torch.float32 for n in moving)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_disabled_is_the_base_bit_for_bit(method, backbone, dtype):
    model = build(backbone).to(dtype)
    view = backbone_of(model)
    view.prepare()
    METHODS[method].base(model)
    with torch.no_grad():
        base = outputs(model, view, backbone)
    wrapped, _, view = adapt(method, backbone, dtype)
    train(wrapped, view, backbone)
    with torch.no_grad():
        assert not torch.equal(outputs(wrapped, view, backbone), base)
        with wrapped.disable_adapter():
            assert torch.equal(outputs(wrapped, view, backbone), base)
        assert not torch.equal(outputs(wrapped, view, backbone), base)


@pytest.mark.parametrize("loader", ["peft", "mmtune"])
def test_saved_and_loaded_is_the_same_bit_for_bit(method, backbone, loader, tmp_path):
    wrapped, _, view = adapt(method, backbone)
    train(wrapped, view, backbone)
    wrapped.save_pretrained(tmp_path)
    fresh = build(backbone)
    fresh_view = backbone_of(fresh)
    if loader == "peft":
        fresh_view.prepare()
        again = peft.PeftModel.from_pretrained(fresh, str(tmp_path))
    else:
        again = load_adapter(fresh, tmp_path)
    with torch.no_grad():
        assert torch.equal(
            outputs(again.eval(), fresh_view, backbone), outputs(wrapped, view, backbone)
        )
    assert not any(p.requires_grad for p in again.parameters())


def test_file_holds_only_the_adapter(method, backbone, tmp_path):
    wrapped, _, _ = adapt(method, backbone)
    wrapped.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    stored = METHODS[method].stored(BACKBONES[backbone].towers)
    assert sum(t.numel() for t in saved.values()) == count(method, backbone) + stored


def test_merged_is_a_stock_model_with_the_same_outputs(method, backbone):
    wrapped, _, view = adapt(method, backbone)
    if not METHODS[method].merges_on(backbone):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge(wrapped)
        return
    train(wrapped, view, backbone)
    with torch.no_grad():
        want = outputs(wrapped, view, backbone)
    merged = merge(wrapped)
    stock = build(backbone)
    assert type(merged) is type(stock)
    assert {n: p.shape for n, p in merged.state_dict().items()} == {
        n: p.shape for n, p in stock.state_dict().items()
    }
    stock.load_state_dict(merged.state_dict())
    with torch.no_grad():
        found = outputs(stock, backbone_of(stock), backbone)
    assert ((found - want).abs().max() / want.abs().max()) < 1e-5


def test_unmerge_gives_the_base_back(method, backbone):
    if not METHODS[method].merges_on(backbone):
        pytest.skip("nothing to unmerge")
    wrapped, model, view = adapt(method, backbone)
    before = copy.deepcopy(model.state_dict())
    train(wrapped, view, backbone)
    wrapped.merge_adapter()
    wrapped.unmerge_adapter()
    for name, value in model.state_dict().items():
        if name in before and ".base_layer." in name:
            assert torch.allclose(value, before[name], atol=1e-6)


def test_several_adapters_switch(method, backbone):
    wrapped, model, view = adapt(method, backbone, seed=1)
    train(wrapped, view, backbone)
    with torch.no_grad():
        first = outputs(wrapped, view, backbone)
    wrapped.add_adapter(
        "second", registry.method(METHODS[method].method).build(model, options(method))
    )
    with torch.no_grad():
        assert torch.equal(outputs(wrapped, view, backbone), first)
    wrapped.set_adapter("second")
    assert wrapped.get_nb_trainable_parameters()[0] == count(method, backbone)
    train(wrapped, view, backbone, steps=2)  # unlike the first: some methods draw nothing
    with torch.no_grad():
        second = outputs(wrapped, view, backbone)
        assert not torch.equal(second, first)
        wrapped.set_adapter("default")
        assert torch.equal(outputs(wrapped, view, backbone), first)
        wrapped.set_adapter("second")
        assert torch.equal(outputs(wrapped, view, backbone), second)
    wrapped.set_adapter("default")
    wrapped.delete_adapter("second")
    assert not [n for n, _ in wrapped.named_parameters() if ".second" in n]
    with torch.no_grad():
        assert torch.equal(outputs(wrapped, view, backbone), first)


def test_gradient_checkpointing_changes_nothing(method, backbone):
    grads = []
    for checkpointing in (False, True):
        wrapped, _, view = adapt(method, backbone)
        with torch.no_grad():
            for p in wrapped.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.ones_like(p))
        wrapped.train()
        if checkpointing and not view.set_gradient_checkpointing():
            pytest.skip("this backbone's layers cannot be checkpointed")
        y = outputs(wrapped, view, backbone)
        # Gradients of order 1 at most, for which the tolerance below is meant.
        (y / y.detach().abs().max().clamp(min=1)).pow(3).sum().backward()
        grads.append([p.grad for p in wrapped.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() <= 1e-6 + 1e-5 * a.abs().max()


def test_no_graph_break_beyond_the_base(method, backbone):
    if method != METHODS[method].method or backbone not in PAIRWISE:
        pytest.skip("compiled for each method's first row, on the dual encoders")
    model = build(backbone)
    view = backbone_of(model)
    view.prepare()

    def breaks(m):
        torch._dynamo.reset()
        inputs = BACKBONES[backbone].batch(0, 3)
        explained = torch._dynamo.explain(lambda **x: view.embed_pairs(m, x).image)(**inputs)
        return explained.graph_break_count

    base = breaks(model)
    wrapped, _, view = adapt(method, backbone)
    assert breaks(wrapped) <= base
