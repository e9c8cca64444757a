"""Few tokens, to which `auto` applies updates themselves: one node for an attention's q, k, v."""

import contextlib
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune import AuroraConfig
from mmtune.backbones import backbone_of
from mmtune.conformance.backbones import images_and_texts
from mmtune.tuners.aurora.layer import AuroraLinear
from mmtune.tuners.aurora.node import updated_tokens
from mmtune.tuners.aurora.origins import cheap
from mmtune.tuners.aurora.updates import Update

from .test_aurora_node import (
    CHECKPOINTING,
    adapted,
    agrees_with_the_separate_path,
    by_autograd,
    case,
    updated_linears,
)


def tokens_updated(x, right, lefts, weights, biases):
    return updated_tokens(x, torch.cat(lefts), right, weights, biases)


@given(
    outs=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    width=st.integers(1, 4),
    rank=st.integers(1, 3),
    tokens=st.sampled_from([(), (2,), (2, 3)]),
    seed=st.integers(0, 2**16),
    asked=st.sampled_from(["all", "x", "right", "lefts"]),
)
@settings(max_examples=25, deadline=None)
def test_tokens_that_are_updated_themselves(outs, width, rank, tokens, seed, asked):
    x, right, lefts, weights, biases = case(outs, width, rank, seed, tokens=tokens)
    for name, tensors in {"x": [x], "right": [right], "lefts": lefts}.items():
        for tensor in tensors:
            tensor.requires_grad_(asked in (name, "all"))

    def run(x, right, *lefts):
        return tokens_updated(x, right, lefts, weights, biases)

    want = by_autograd(x, right, lefts, weights, biases)
    for y, w in zip(run(x, right, *lefts), want, strict=True):
        assert y.shape == w.shape
        assert torch.allclose(y, w, atol=1e-12)
    assert torch.autograd.gradcheck(run, (x, right, *lefts))


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_few_tokens_leave_what_trains_to_autograd(trained):
    x, right, lefts, weights, biases = case((3, 2), 4, 2, 0)
    leaf = (weights if trained == "weight" else biases)[1].requires_grad_()
    sums = [sum(y.sin().sum() for y in f(x, right, lefts, weights, biases))
            for f in (tokens_updated, by_autograd)]  # fmt: skip
    found, want = (torch.autograd.grad(total, [leaf, x, right, *lefts]) for total in sums)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, want, strict=True))


def test_autocast_decides_the_outputs_of_few_tokens():
    x, right, lefts, weights, biases = case((3, 2), 4, 2, 0, torch.float32)
    kept = []
    noting = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with noting, torch.autocast("cpu", torch.bfloat16):
        outputs = tokens_updated(x, right, lefts, weights, biases)
    want = by_autograd(x, right, lefts, weights, biases)
    for y, w in zip(outputs, want, strict=True):
        assert y.dtype == torch.bfloat16
        assert torch.allclose(y.float(), w, rtol=2e-2, atol=6e-2)
    assert {w.data_ptr() for w in weights} <= {t.data_ptr() for t in kept}  # no copies of them
    sum(y.sum() for y in outputs).backward()
    assert right.grad.dtype == lefts[0].grad.dtype == x.grad.dtype == torch.float32


@pytest.mark.parametrize("outs", [(3,), (3, 2), (3, 2, 2)])
@pytest.mark.parametrize("graded", [True, False])
def test_nodes_compile_in_one_graph(outs, graded):
    x, right, lefts, weights, biases = case(outs, 4, 2, 0)
    for function in (updated_linears, tokens_updated):
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        with torch.set_grad_enabled(graded):
            found = compiled(x, right, lefts, weights, biases)
            want = by_autograd(x, right, lefts, weights, biases)
        assert all(torch.allclose(y, w, atol=1e-12) for y, w in zip(found, want, strict=True))
        if graded:
            sums = (sum(y.sin().sum() for y in ys) for ys in (found, want))
            grads = (torch.autograd.grad(total, [x, right, *lefts]) for total in sums)
            assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*grads, strict=True))


def few_step(model, context=None):
    """As `step`, with fewer words than `auto` forms weights for; `context` is of its backward."""
    model.train()
    inputs = {key: value[:1] for key, value in images_and_texts(0, 3).items()}
    inputs = {**inputs, "pixel_values": inputs["pixel_values"].double()}
    if "attention_mask" in inputs:
        inputs["attention_mask"] = inputs["attention_mask"][:, :3]
    inputs["input_ids"] = inputs["input_ids"][:, :3]
    out = model(**inputs)
    loss = (out.image_embeds * out.text_embeds).sum() + out.text_embeds.pow(3).sum()
    with context or contextlib.nullcontext():
        loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def count_calls(monkeypatch, calls):
    """Note who has its update applied to tokens, and to its weight."""
    for name in ("on_tokens", "outputs"):
        stock = getattr(Update, name)

        def counted(self, x, name=name, stock=stock):
            calls.append((name, len(self.members)))
            return stock(self, x)

        monkeypatch.setattr(Update, name, counted)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("core", ["diagonal", "dense"])
@pytest.mark.parametrize("sites", [["q", "k", "v", "out"], ["v", "fc1", "fc2"]])
def test_few_tokens_have_the_gradients_of_the_separate_path(sites, core, checkpointing):
    settings = {"sites": sites, "core": core, "alpha": 0.5}
    agrees_with_the_separate_path("auto", few_step, checkpointing, **settings)


def test_few_tokens_are_updated_with_their_siblings(monkeypatch):
    calls = []
    count_calls(monkeypatch, calls)
    few_step(adapted("auto", branches=["text"]))
    assert calls == [("on_tokens", 3), ("on_tokens", 1)] * 2
    calls.clear()
    model = adapted("auto", branches=["text"])
    model.add_adapter("always", AuroraConfig(rank=2, branches=["text"], compute="materialise"))
    model.double().base_model.set_adapter(["default", "always"])
    few_step(model)
    assert calls == [("outputs", 3), ("outputs", 1)] * 2


@contextlib.contextmanager
def disabled(model):
    """As PEFT disables adapters, which however takes their wish for gradients, too."""
    layers = [m for m in model.modules() if isinstance(m, AuroraLinear)]
    for layer in layers:
        layer._disable_adapters = True
    yield
    for layer in layers:
        layer._disable_adapters = False


def test_what_was_known_of_few_tokens_serves_their_recomputation_whatever_acts_then():
    want = few_step(adapted("auto"))
    model = adapted("auto")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    loss, grads = few_step(model, context=disabled(model))
    assert torch.equal(loss, want[0])
    assert all(torch.allclose(grads[n], g, atol=1e-10) for n, g in want[1].items())


@pytest.mark.parametrize("compute", ["auto", "materialise"])
def test_what_waits_is_not_for_a_sibling_that_is_disabled(compute):
    model = adapted(compute)
    q, k = (
        next(m for n, m in model.named_modules() if n.endswith(f"layers.0.self_attn.{role}_proj"))
        for role in "qk"
    )
    x = torch.randn(1, 2, q.in_features).double()
    with_update = k(x.clone())
    q(x)
    with model.disable_adapter():
        assert torch.equal(k(x), k.base_layer(x))
    assert torch.equal(k(x), with_update)


def test_a_layer_with_a_separate_adapter_besides_computes_alone(monkeypatch):
    calls = []
    count_calls(monkeypatch, calls)
    model = adapted("auto", branches=["text"])
    model.add_adapter("apart", AuroraConfig(rank=2, seed=6, branches=["text"], compute="separate"))
    for name, p in model.named_parameters():
        if "aurora_V.apart" in name:
            torch.nn.init.normal_(p, std=0.3)
    model.double().base_model.set_adapter(["default", "apart"])
    loss, grads = few_step(model)
    assert calls == [("on_tokens", 1)] * 8
    for layer in model.modules():
        if isinstance(layer, AuroraLinear):
            apart = layer.aurora_placed["default"]
            layer.aurora_placed["default"] = dataclasses.replace(apart, compute="separate")
    model.zero_grad()
    want, wanted = few_step(model)
    assert len(calls) == 8
    assert torch.allclose(loss, want)
    assert all(torch.allclose(grads[n], g, atol=1e-10) for n, g in wanted.items())


def test_few_tokens_do_not_keep_what_norms_give():
    torch.manual_seed(0)
    model = adapted("auto", branches=["text"])
    view = backbone_of(model.get_base_model())
    given, kept = {}, set()
    for module in cheap(view, view.select(["text"], ["q"])):
        module.register_forward_hook(lambda m, a, out: given.update({out.data_ptr(): out}) or None)

    def pack(t):
        kept.add(t.data_ptr())
        return t

    ids = images_and_texts(0, 3)["input_ids"][:1, :3]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        view.encode_text(model.get_base_model(), ids)
    assert given
    assert not kept & set(given)
