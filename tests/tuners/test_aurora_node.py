"""Linears with low-rank updates as one node: its values, gradients, and what it does not keep."""

import copy
import types

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmtune import AuroraConfig
from mmtune.backbones import backbone_of
from mmtune.conformance.backbones import build, images_and_texts
from mmtune.tuners.aurora.factors import Blocks, ModeFactors
from mmtune.tuners.aurora.layer import AuroraLinear
from mmtune.tuners.aurora.node import updated_linear
from mmtune.tuners.aurora.origins import Origins, cheap, origin_of
from mmtune.tuners.aurora.rounds import AT_ONCE
from mmtune.tuners.aurora.stacks import Stack
from mmtune.tuners.aurora.updates import Update


def case(outs, width, rank, seed, dtype=torch.float64, tokens=(2, 3)):
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    x, right = drawn(*tokens, width).requires_grad_(), drawn(rank, width).requires_grad_()
    lefts = [drawn(o, rank).requires_grad_() for o in outs]
    weights = [drawn(o, width) for o in outs]
    biases = [drawn(o) if i % 2 else None for i, o in enumerate(outs)]
    return x, right, lefts, weights, biases


def updated_linears(x, right, lefts, weights, biases, formed=False):
    left, widths = torch.cat(lefts), [len(w) for w in weights]
    bias = torch.cat(
        [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
    )
    whole = (torch.cat(weights) + left @ right).detach() if formed else None
    given = () if formed else weights
    outputs = updated_linear(x, left, right, given, bias, whole)
    return outputs[0].split(widths, -1) if formed else outputs


def by_autograd(x, right, lefts, weights, biases):
    return tuple(
        F.linear(x, w + left @ right, b) for w, left, b in zip(weights, lefts, biases, strict=True)
    )


@given(
    outs=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    width=st.integers(1, 4),
    rank=st.integers(1, 3),
    seed=st.integers(0, 2**16),
    formed=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_gradients_in_float64(outs, width, rank, seed, formed):
    x, right, lefts, weights, biases = case(outs, width, rank, seed)

    def run(x, right, *lefts):
        # A weight formed of the factors that gradcheck moves must move along.
        return updated_linears(x, right, lefts, weights, biases, formed)

    want = by_autograd(x, right, lefts, weights, biases)
    for y, w in zip(run(x, right, *lefts), want, strict=True):
        assert torch.allclose(y, w, atol=1e-12)
    assert torch.autograd.gradcheck(run, (x, right, *lefts))


@pytest.mark.parametrize("asked", ["x", "right", "lefts"])
def test_each_gradient_by_itself(asked):
    x, right, lefts, weights, biases = case((3, 2), 4, 2, 0)
    for name, tensors in {"x": [x], "right": [right], "lefts": lefts}.items():
        for tensor in tensors:
            tensor.requires_grad_(name == asked)
    leaves = {"x": [x], "right": [right], "lefts": lefts}[asked]
    sums = [sum(y.sin().sum() for y in f(x, right, lefts, weights, biases))
            for f in (updated_linears, by_autograd)]  # fmt: skip
    found, want = (torch.autograd.grad(total, leaves) for total in sums)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, want, strict=True))


def test_an_output_that_nobody_uses_adds_nothing():
    x, right, lefts, weights, biases = case((3, 2), 4, 2, 0)
    first, _ = updated_linears(x, right, lefts, weights, biases)
    grads = torch.autograd.grad(first.sum(), [x, right, *lefts])
    want, _ = by_autograd(x, right, lefts, weights, biases)
    wanted = torch.autograd.grad(want.sum(), [x, right, lefts[0]])
    assert all(torch.allclose(a, b) for a, b in zip(grads[:3], wanted, strict=True))
    assert not grads[3].any()


def test_weights_that_train_are_left_to_autograd():
    x, right, lefts, weights, biases = case((3,), 4, 2, 0)
    weights[0].requires_grad_()
    (y,) = updated_linears(x, right, lefts, weights, biases)
    (grad,) = torch.autograd.grad(y.sum(), weights)
    assert torch.allclose(grad, x.sum((0, 1)).expand(3, 4))


def test_factors_keep_their_dtype_and_autocast_decides_the_outputs():
    x, right, lefts, weights, biases = case((3, 2), 4, 2, 0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = updated_linears(x, right, lefts, weights, biases)
        want = by_autograd(x, right, lefts, weights, biases)
    assert all(y.dtype == torch.bfloat16 for y in outputs)
    for y, w in zip(outputs, want, strict=True):
        assert torch.allclose(y.float(), w.float(), rtol=2e-2, atol=2e-2)
    sum(y.sum() for y in outputs).backward()
    assert right.grad.dtype == lefts[0].grad.dtype == x.grad.dtype == torch.float32


def test_no_weight_is_kept_for_backward():
    x, right, lefts, weights, biases = case((3, 2), 4, 2, 0)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        updated_linears(x, right, lefts, weights, biases)
    shapes = [t.shape for t in (x, torch.cat(lefts), right, *weights)]
    assert [t.shape for t in kept if t.shape != torch.Size([5])] == shapes


def test_a_formed_weight_is_kept_where_tokens_are_many():
    x, right, lefts, weights, biases = case((2, 3), 4, 2, 0, tokens=(5, 8))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outputs = updated_linears(x, right, lefts, weights, biases)
    whole = torch.cat(weights) + torch.cat(lefts) @ right
    assert any(t.shape == whole.shape and torch.allclose(t, whole) for t in kept)
    grads = torch.autograd.grad(sum(y.sin().sum() for y in outputs), [x, right, *lefts])
    outputs = by_autograd(x, right, lefts, weights, biases)
    want = torch.autograd.grad(sum(y.sin().sum() for y in outputs), [x, right, *lefts])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(grads, want, strict=True))


def stack_of(u, modes, columns=False, dtype=torch.bfloat16):
    count = len(modes)
    layers = [types.SimpleNamespace(linear=nn.Linear(4, 3).to(dtype)) for _ in range(count)]
    v = torch.ones(3, len(u))
    return Stack([[layer] for layer in layers], u, v, modes, columns, dtype, whole=True)


def test_gradients_of_shared_factors_are_summed_in_their_own_dtype():
    u = torch.zeros(1, 4, requires_grad=True)
    stack = stack_of(u, torch.ones(257, 1, 1))
    assert all(part.dtype == torch.bfloat16 for pair in stack.pairs for part in pair)
    sum(right.sum() for _, right in stack.pairs).backward()
    assert u.grad.tolist() == [[257] * 4]  # 256 in bfloat16


def adapted(compute, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    model = peft.get_peft_model(
        build("clip").to(dtype), AuroraConfig(rank=4, seed=1, compute=compute, **settings)
    )
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "aurora_V" in name:
            p.data = 0.3 * torch.randn(p.shape, generator=generator).to(p)
        p.data = p.data.to(dtype)
    return model


def step(model, **options):
    inputs = images_and_texts(0, 3)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    out = model(**inputs)
    loss = (out.image_embeds * out.text_embeds).sum() + out.image_embeds.pow(3).sum()
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


CHECKPOINTING = [None, {"use_reentrant": False}, {"use_reentrant": True}]


def agrees_with_the_separate_path(compute, step, checkpointing, **settings):
    """Losses and gradients of a step, with nothing left waiting after it."""
    found = []
    for way in ("separate", compute):
        model = adapted(way, **settings).train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable(checkpointing)
            model.enable_input_require_grads()
        found.append(step(model))
        waiting = [m.siblings._waiting for m in model.modules() if isinstance(m, AuroraLinear)]
        assert not any(waiting)
    (first, wanted), (loss, grads) = found
    assert torch.allclose(loss, first)
    assert grads.keys() == wanted.keys()
    assert all(torch.allclose(g, wanted[n], rtol=1e-8, atol=1e-10) for n, g in grads.items())


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("sites", [["q", "k", "v", "out"], ["v", "k", "fc1", "fc2"], ["q", "v"]])
def test_a_model_has_the_gradients_of_the_separate_path(sites, checkpointing):
    agrees_with_the_separate_path("materialise", step, checkpointing, sites=sites)


@pytest.mark.parametrize(("tokens", "formed"), [(7, []), (8, [1]), (9, [1])])
def test_auto_forms_the_weight_where_that_multiplies_fewer_numbers(tokens, formed, monkeypatch):
    calls = []
    stock = Update.outputs
    monkeypatch.setattr(
        Update, "outputs", lambda self, x: calls.append(len(self.members)) or stock(self, x)
    )
    factors = ModeFactors()
    factors.add_adapter("default")
    layer = AuroraLinear(nn.Linear(16, 16), factors).double()
    config = AuroraConfig(rank=4, compute="auto", seed=0)
    layer.add_adapter("default", "16x16", Blocks(16, 16), 4, config, None)
    layer.double(), factors.double()
    factors.aurora_V["default"]["16x16"].data.normal_()
    layer.set_adapter("default")
    x = torch.randn(tokens, 16).double()
    want = layer.base_layer(x) + x @ layer.get_delta_weight("default").T
    assert torch.allclose(layer(x), want)
    assert calls == formed


def test_auto_with_dropout_is_separate():
    assert not AuroraConfig(compute="auto", dropout=0.1).forms()
    assert AuroraConfig(compute="auto").forms()


def test_siblings_compute_once_what_they_share(monkeypatch):
    calls = []
    stock = Update.outputs
    monkeypatch.setattr(
        Update, "outputs", lambda self, x: calls.append(len(self.members)) or stock(self, x)
    )
    step(adapted("materialise"))
    assert calls == [3, 1] * 4  # q, k, v; out; in two layers of two towers


def test_siblings_called_with_other_tokens_compute_alone():
    model = adapted("materialise")
    q, k, v = (
        next(m for n, m in model.named_modules() if n.endswith(f"layers.0.self_attn.{role}_proj"))
        for role in "qkv"
    )
    x, other = torch.randn(2, 5, q.in_features).double(), torch.randn(2, 5, q.in_features).double()
    alone = k(other), v(x)
    q(x)
    assert torch.equal(k(other), alone[0])
    assert torch.allclose(v(x), alone[1], atol=1e-12)
    before = v.get_delta_weight("default")
    q(x)
    v.aurora_modes["default"].data.mul_(2)
    q(x)  # what waited is of the weights of before
    assert torch.allclose(v(x), v.base_layer(x) + x @ (2 * before).T, atol=1e-12)


def test_a_copy_has_siblings_of_its_own():
    model = adapted("materialise")
    step(model)
    layer = next(m for m in model.modules() if isinstance(m, AuroraLinear))
    layer(torch.randn(2, 5, layer.in_features).double())  # its siblings' outputs wait
    copied = copy.deepcopy(model)
    theirs = {id(m) for m in copied.modules()}
    for m in copied.modules():
        if isinstance(m, AuroraLinear):
            assert {id(one) for one in m.siblings.members} <= theirs
            assert {id(one) for one in m.rounds.layers} <= theirs
    assert torch.equal(step(copied)[0], step(model)[0])


@pytest.mark.parametrize("sites", [["q", "k", "v", "out"], ["fc1", "fc2"]])
@pytest.mark.parametrize("backbone", ["clip", "open_clip", "open_clip-fused", "open_clip-timm"])
def test_what_norms_and_activations_give_is_not_kept(sites, backbone):
    torch.manual_seed(0)
    settings = AuroraConfig(rank=4, seed=1, compute="materialise", sites=sites)
    model = peft.get_peft_model(build(backbone), settings)
    view, inputs = backbone_of(model.get_base_model()), images_and_texts(0, 3)
    given, kept = {}, set()
    for module in cheap(view, view.select(None, sites)):
        module.register_forward_hook(lambda m, a, out: given.update({out.data_ptr(): out}) or None)

    def pack(t):
        kept.add(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        view.embed_pairs(model, inputs)
    assert given
    assert not kept & set(given)


def test_a_tensor_changed_in_place_is_kept_as_it_is():
    norm = nn.LayerNorm(4)
    origins = Origins()
    origins.watch([norm])
    x, right, lefts, weights, biases = case((3,), 4, 2, 0, torch.float32)
    y = norm(x.detach())
    assert origin_of(y) is not None
    y.mul_(2)
    assert origin_of(y) is None
    (out,) = updated_linears(y, right, lefts, weights, biases)
    (grad,) = torch.autograd.grad(out.sum(), [right])
    (want,) = torch.autograd.grad(by_autograd(y, right, lefts, weights, biases)[0].sum(), [right])
    assert torch.allclose(grad, want, atol=1e-5)
    origins.detach()
    assert origin_of(norm(x)) is None


class Casting(nn.Module):
    """Tells whether autocast is on, as a norm does in its own way."""

    def forward(self, x):
        return x * (2 if torch.is_autocast_enabled("cpu") else 3)


@pytest.mark.parametrize("casts", [True, False])
def test_what_is_computed_again_is_computed_under_the_autocast_of_its_time(casts):
    module, origins = Casting(), Origins()
    origins.watch([module])
    x, right, lefts, weights, biases = case((3,), 4, 2, 0, torch.float32)
    x = x.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=casts):
        y = module(x)
        assert origin_of(y) is not None
        (out,) = updated_linears(y, right, lefts, weights, biases)
    (grad,) = torch.autograd.grad(out.sum(), [right])
    y = x * (2 if casts else 3)
    with torch.autocast("cpu", torch.bfloat16, enabled=casts):
        (out,) = updated_linears(y, right, lefts, weights, biases)
    assert torch.equal(grad, torch.autograd.grad(out.sum(), [right])[0])


def test_unloading_takes_the_marks_away():
    model = adapted("materialise").unload()
    assert not any(m._forward_hooks for m in model.modules())


SETTINGS = [
    {"core": "diagonal"},
    {"core": "dense"},
    {"core": "dense", "block_layout": "interleaved"},
    {"sharing": "layer"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("sites", [["q", "k", "v", "out"], ["q", "fc1", "fc2"]])
def test_a_round_has_the_update_of_each_layer(settings, sites):
    model = adapted("materialise", sites=sites, alpha=0.5, **settings)
    layers = [m for m in model.modules() if isinstance(m, AuroraLinear)]
    rounds = layers[0].rounds
    assert len(rounds.layers) == len(layers)
    rounds._begin(model, ())
    assert len(rounds._known) == len(layers)
    for layer in layers:
        update = rounds.known(layer).update
        members = [m for m in update.members if m is layer]
        assert len(members) == 1
        ((stack, place),) = update.places
        delta, whole = update.left @ update.right, stack.formed(place)[0]
        bases = torch.cat([m.linear.weight for m in update.members])
        assert torch.allclose(whole, bases + delta, atol=1e-12)
        start = sum(m.out_features for m in update.members[: update.members.index(layer)])
        mine = delta[start : start + layer.out_features]
        assert mine.abs().max() > 1e-3
        assert torch.allclose(mine, layer.get_delta_weight("default"), atol=1e-12)
    rounds._end(model, (), None)
    assert not rounds._stacks
    assert rounds.known(layers[0]) is None


def test_a_pass_without_gradients_leaves_nothing():
    model = adapted("materialise")
    rounds = next(m for m in model.modules() if isinstance(m, AuroraLinear)).rounds
    with torch.no_grad():
        model(**{**images_and_texts(0, 3), "pixel_values": parts_of(model)[1]})
    assert not rounds._known


def test_no_formed_weight_outlives_the_pass():
    model = adapted("materialise").train()
    rounds = next(m for m in model.modules() if isinstance(m, AuroraLinear)).rounds
    seen = []
    model.get_base_model().register_forward_hook(
        lambda m, a, out: seen.extend(s for s in rounds._stacks if s._formed), prepend=True
    )
    step(model)
    assert len(seen) == 2  # a tower each
    assert not rounds._stacks
    assert not any(s._formed for s in seen)
    again = seen[0].formed(1)  # as a layer that is recomputed asks
    assert not seen[0]._formed
    (left, right), base = seen[0].pairs[1], seen[0]._units[1][0].linear
    assert torch.allclose(again[0], base.weight + left @ right)


@pytest.mark.parametrize("why", ["size", "trains"])
def test_weights_are_not_formed_at_once_where_something_speaks_against_it(why, monkeypatch):
    want = step(adapted("materialise"))
    model = adapted("materialise")
    if why == "size":
        monkeypatch.setattr("mmtune.tuners.aurora.rounds.AT_ONCE", 8 * 16 * 16)
    else:
        for m in model.modules():
            if isinstance(m, AuroraLinear):
                m.linear.bias.requires_grad_()
    formed = []
    stock = Stack.formed
    monkeypatch.setattr(
        Stack, "formed", lambda self, i: formed.append(stock(self, i)) or formed[-1]
    )
    loss, grads = step(model)
    assert formed
    assert not any(formed)
    assert torch.allclose(loss, want[0])
    assert all(torch.allclose(grads[n], g, atol=1e-10) for n, g in want[1].items())
    assert AT_ONCE == 2**29


def test_the_updates_of_several_adapters_add_up():
    model = adapted("materialise")
    model.add_adapter("other", AuroraConfig(rank=3, seed=5, compute="materialise", alpha=2.0))
    model.add_adapter("apart", AuroraConfig(rank=2, seed=6))
    for name, p in model.named_parameters():
        if "aurora_V" in name and "default" not in name:
            torch.nn.init.normal_(p, std=0.1)
        p.data = p.data.double()
    model.base_model.set_adapter(["default", "other", "apart"])
    loss = step(model)[0]
    for layer in model.modules():
        if isinstance(layer, AuroraLinear):
            total = sum(layer.get_delta_weight(n) for n in ("default", "other", "apart"))
            layer.linear.weight.data += total.detach()
    with model.disable_adapter():
        inputs = images_and_texts(0, 3)
        out = model(**{**inputs, "pixel_values": inputs["pixel_values"].double()})
    merged = (out.image_embeds * out.text_embeds).sum() + out.image_embeds.pow(3).sum()
    assert torch.allclose(loss, merged)


def test_pairs_are_computed_once_a_forward_pass(monkeypatch):
    calls = []
    stock = AuroraLinear.stack
    monkeypatch.setattr(
        AuroraLinear,
        "stack",
        lambda self, name, units, **k: (
            calls.append(sum(map(len, units))) or stock(self, name, units, **k)
        ),
    )
    model = adapted("materialise").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    step(model)
    assert calls == [8, 8]  # two towers, of two layers with four projections each
    step(model)
    assert calls == [8, 8] * 2


def test_parts_called_past_the_forward_pass_and_twice_before_a_backward():
    model = adapted("materialise")
    view, inputs = backbone_of(model.get_base_model()), images_and_texts(0, 3)
    pixels = inputs["pixel_values"].double()
    step(model)
    model.zero_grad()
    first = view.encode_image(model.get_base_model(), pixels).pow(3).sum()
    second = view.encode_image(model.get_base_model(), pixels).pow(3).sum()
    (first + second).backward()
    both = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    view.encode_image(model.get_base_model(), pixels).pow(3).sum().backward()
    for name, p in model.named_parameters():
        if name in both:
            assert torch.allclose(both[name], 2 * p.grad, atol=1e-10)


def test_a_changed_factor_is_seen_by_the_next_pass():
    model = adapted("materialise")
    before = step(model)[0]
    for name, p in model.named_parameters():
        if "aurora_modes" in name:
            p.data.zero_()
    changed = step(model)[0]
    with model.disable_adapter():
        base = model(
            **{
                **images_and_texts(0, 3),
                "pixel_values": images_and_texts(0, 3)["pixel_values"].double(),
            }
        )
    want = (base.image_embeds * base.text_embeds).sum() + base.image_embeds.pow(3).sum()
    assert torch.allclose(changed, want)
    assert not torch.allclose(before, changed)


def test_an_error_in_the_forward_pass_ends_the_round():
    model = adapted("materialise")
    rounds = next(m for m in model.modules() if isinstance(m, AuroraLinear)).rounds
    with pytest.raises(Exception):  # noqa: B017, PT011
        model(pixel_values=torch.zeros(1, 3, 5, 5), input_ids=torch.zeros(1, 4, dtype=torch.long))
    assert not rounds._open


def test_compiled_in_one_graph_it_is_the_same():
    model = adapted("materialise")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss, grads = step(compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    model.zero_grad()
    want, wanted = step(adapted("materialise"))
    assert torch.allclose(loss, want)
    assert len(grads) == len(wanted)
    for found, expected in zip(grads.values(), wanted.values(), strict=True):
        assert torch.allclose(found, expected, atol=1e-10)


def test_a_plan_is_made_anew_where_adapters_act_in_another_way():
    model = adapted("materialise")
    rounds = next(m for m in model.modules() if isinstance(m, AuroraLinear)).rounds
    step(model)
    plan = rounds._planned()
    step(model)
    assert rounds._planned() is plan
    with model.disable_adapter():
        assert not rounds._planned().units
    layer = rounds.layers[0]
    layer.merge()
    assert layer not in [m for unit in rounds._planned().units for m in unit.members]
    layer.unmerge()
    layer.linear.weight.data = layer.linear.weight.data.float()
    assert len(rounds._planned().stacks) == len(plan.stacks) + 1


def test_few_tokens_without_gradients_compute_no_update(monkeypatch):
    model = adapted("auto")
    rounds = next(m for m in model.modules() if isinstance(m, AuroraLinear)).rounds
    calls = []
    stock = rounds._compute
    monkeypatch.setattr(rounds, "_compute", lambda: calls.append(1) or stock())
    inputs = images_and_texts(0, 3)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    few = {key: value[:1] for key, value in inputs.items()}
    few["input_ids"] = few["input_ids"][:, :3]
    few.pop("attention_mask", None)
    with torch.no_grad():
        model(**few)
        assert not calls
        model(**inputs)
    assert calls == [1]
    model(**few)  # checkpointing might compute again what asks first
    assert calls == [1, 1]


def parts_of(model):
    inputs = images_and_texts(0, 3)
    return model.get_base_model(), inputs["pixel_values"].double()


def during(model, inside):
    """What `inside` gives when it is called within a forward pass of the model."""
    found = []

    def once(*_):
        hook.remove()
        found.append(inside())

    hook = model.get_base_model().vision_model.register_forward_pre_hook(once)
    step(model)
    return found[0]


@pytest.mark.parametrize("change", ["values", "disabled", "switched"])
def test_what_is_exchanged_within_a_pass_is_seen(change):
    model = adapted("materialise")
    base, pixels = parts_of(model)
    modes = [p for n, p in model.named_parameters() if "aurora_modes" in n]
    if change == "switched":
        model.add_adapter("other", AuroraConfig(rank=2, seed=9, compute="materialise"))
        for n, p in model.named_parameters():
            p.data = p.data.double()
            if "aurora_V.other" in n:
                torch.nn.init.normal_(p, std=0.3)

    def teacher():
        def features():
            with torch.no_grad():
                return base.vision_model(pixels).pooler_output

        if change == "disabled":
            with model.disable_adapter():
                return features()
        if change == "switched":
            model.base_model.set_adapter("other")
            found = features()
            model.base_model.set_adapter("default")
            return found
        before = [p.data for p in modes]
        for p in modes:
            p.data = 2 * p.data
        found = features()
        for p, data in zip(modes, before, strict=True):
            p.data = data
        return found

    want = teacher()  # outside of any pass
    assert torch.allclose(during(model, teacher), want)
    assert not torch.allclose(want, base.vision_model(pixels).pooler_output)


def test_a_part_without_gradients_goes_with_checkpointing():
    want = step(adapted("materialise").train())
    for inside in (True, False):
        model = adapted("materialise").train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        base, pixels = parts_of(model)

        def teacher(base=base, pixels=pixels):
            with torch.no_grad():
                return base.vision_model(pixels).pooler_output

        if inside:
            during(model, teacher)
            model.zero_grad()
        loss, grads = step(model)
        assert torch.allclose(loss, want[0])
        assert all(torch.allclose(grads[n], g, atol=1e-10) for n, g in want[1].items())


def test_another_pass_before_the_backward_of_a_checkpointed_one():
    want = step(adapted("materialise").train())
    model = adapted("materialise").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    inputs = images_and_texts(0, 3)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    out = model(**inputs)
    with torch.no_grad(), model.disable_adapter():
        model(**inputs)
    with torch.no_grad():
        model(**inputs)
    ((out.image_embeds * out.text_embeds).sum() + out.image_embeds.pow(3).sum()).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(torch.allclose(grads[n], g, atol=1e-10) for n, g in want[1].items())
    # A part called by itself computes alone, also when it is computed again.
    model.zero_grad()
    base, pixels = parts_of(model)
    base.vision_model(pixels).pooler_output.pow(3).sum().backward()


def test_room_for_formed_weights_is_the_models():
    model = adapted("materialise", sharing="layer")
    layers = [m for m in model.modules() if isinstance(m, AuroraLinear)]
    one = sum(m.linear.weight.nbytes for m in layers) // 4  # of four layers
    import mmtune.tuners.aurora.rounds as module

    for room, fitting in ((0, 0), (2 * one, 2), (4 * one, 4)):
        module.AT_ONCE, stock = room, module.AT_ONCE
        try:
            stacks = module.Plan(layers).stacks
        finally:
            module.AT_ONCE = stock
        assert [whole for *_, whole in stacks].count(True) == fitting


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("why", ["class", "dtype", "hook"])
def test_only_plain_linears_get_an_update_added(why):
    base = (Scaled if why == "class" else nn.Linear)(16, 16)
    if why == "dtype":
        base.weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)
    if why == "hook":
        base.register_forward_hook(lambda m, args, out: out + 1)
    factors = ModeFactors()
    factors.add_adapter("default")
    layer = AuroraLinear(base, factors)
    with pytest.raises(ValueError, match="Set compute: auto, or separate"):
        layer.add_adapter(
            "default", "16x16", Blocks(16, 16), 4, AuroraConfig(compute="materialise"), None
        )
    layer.add_adapter("default", "16x16", Blocks(16, 16), 4, AuroraConfig(), None)
    assert layer.aurora_placed["default"].compute == "separate"
    layer.set_adapter("default")
    x = torch.randn(20, 16)
    if why != "dtype":
        assert torch.equal(layer(x), base(x))
