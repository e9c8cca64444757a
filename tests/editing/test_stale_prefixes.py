"""Batches that are computed once, where something below or around the edit's place changes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from editing.edits import ContextEdit
from tests.editing.prefix_cases import edit_of, few, gradients, moved, place, same, shared
from tests.editing.tiny import MODELS, OTHER, PROBES, SEEN, bits, same_bits, tiny


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_is_out_of_date_is_computed_again(name):
    """An edit below, weights below, a weight written to: the numbers are a plain batch's."""
    mllm = tiny(name)
    above, below = place(mllm, "last MLP"), place(mllm, "vision and language")
    plain = mllm.batch(PROBES[:3])
    batch = mllm.cached(plain, above)
    before = mllm.answer_logits(batch), few(mllm, batch)
    lower = moved(below, 5, size=2.0)
    want = mllm.answer_logits(plain, lower)
    assert not torch.equal(want, before[0])
    assert torch.equal(mllm.answer_logits(batch, lower), want)
    assert same(gradients(mllm, batch, lower), gradients(mllm, plain, lower))
    assert torch.equal(mllm.answer_logits(batch), before[0])
    for seed in (6, 7):  # the memory of the first edit may go to the second
        with edit_of(mllm, below, seed).applied(mllm):
            assert torch.equal(mllm.answer_logits(batch), mllm.answer_logits(plain))
            assert few(mllm, batch) == few(mllm, plain)
    assert torch.equal(mllm.answer_logits(batch), before[0])
    assert few(mllm, batch) == before[1]
    mllm.model.get_parameter(next(iter(below))).mul_(1.5)
    assert torch.equal(mllm.answer_logits(batch), mllm.answer_logits(plain))


@torch.no_grad()
def test_a_parameter_outside_every_layer_is_seen_to_change():
    """BLIP-2's learned queries are nobody's but the model's own."""
    mllm = tiny("blip2-opt")
    plain = mllm.batch([SEEN, OTHER])
    batch = mllm.cached(plain, place(mllm, "last MLP"))
    before = mllm.answer_logits(batch)
    mllm.model.query_tokens.add_(1.0)
    found = mllm.answer_logits(batch)
    assert torch.equal(found, mllm.answer_logits(plain))
    assert not torch.equal(found, before)


@pytest.mark.parametrize(
    ("name", "layer"), [("blip2-opt", 0), ("blip2-t5", 0), ("llava", 0), ("llava", -1)]
)
@torch.no_grad()
def test_hooks_act_and_see_what_they_would_see(name, layer):
    """A hook below, whose effect changes from pass to pass, and one where the edit is."""
    mllm = shared(name)
    site = mllm.backbone.select(["language"], ["fc2"], [layer])[0]
    plain = mllm.batch(PROBES[:3])
    batch = mllm.cached(plain, place(mllm, "last MLP"))
    before = mllm.answer_logits(batch)
    seen, shift = [], [0.0]

    def act(module, args, output):
        seen.append(args[0])
        return output + shift[0]

    handle = site.module.register_forward_hook(act)
    for shift[0] in (0.5, 1.0):
        for compute in (mllm.answer_logits, partial(few, mllm)):
            seen.clear()
            found = compute(batch)
            mine = list(seen)
            seen.clear()
            want = compute(plain)
            assert same(mine, seen)
            assert torch.equal(found, want) if compute == mllm.answer_logits else found == want
        assert not torch.equal(mllm.answer_logits(batch), before)
    handle.remove()
    assert torch.equal(mllm.answer_logits(batch), before)


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("blip2-opt", "query_tokens"),
        ("llava", "model.vision_tower.embeddings.class_embedding"),
        ("llava", "model.language_model.embed_tokens.weight"),
    ],
)
@torch.no_grad()
def test_places_that_are_not_known_are_computed_as_ever(name, parameter):
    mllm = tiny(name)
    if parameter not in dict(mllm.model.named_parameters()):
        parameter = parameter.replace("vision_tower.", "vision_tower.vision_model.")
    weights = {parameter: mllm.model.get_parameter(parameter).detach()}
    plain = mllm.batch(PROBES)
    batch = mllm.cached(plain, weights)
    for seed in (1, 2):
        given = moved(weights, seed)
        assert torch.equal(mllm.answer_logits(batch, given), mllm.answer_logits(plain, given))
        assert few(mllm, batch, given) == few(mllm, plain, given)


@torch.no_grad()
def test_tied_weights_change_wherever_they_are():
    mllm = tiny("llava")
    words = mllm.model.get_input_embeddings()
    mllm.model.lm_head.weight = words.weight
    plain = mllm.batch(PROBES)
    batch = mllm.cached(plain, ["lm_head.weight"])
    before = mllm.answer_logits(batch)
    words.weight.mul_(1.5)
    assert torch.equal(mllm.answer_logits(batch), mllm.answer_logits(plain))
    assert not torch.equal(mllm.answer_logits(batch), before)


@torch.no_grad()
def test_a_weight_that_is_used_past_its_module_is_computed_as_ever(monkeypatch):
    """Fused kernels multiply by a Linear's weight and never call it."""
    mllm = tiny("llava")
    weights = place(mllm, "last MLP")
    mlp = mllm.backbone.select(["language"], ["mlp"], "last:1")[0].module

    def fused(self, x):
        up = F.silu(F.linear(x, self.gate_proj.weight)) * F.linear(x, self.up_proj.weight)
        return F.linear(up, self.down_proj.weight)

    monkeypatch.setattr(type(mlp), "forward", fused)
    plain = mllm.batch(PROBES)
    batch = mllm.cached(plain, weights)
    for seed in (1, 2, 3):
        given = moved(weights, seed)
        assert torch.equal(mllm.answer_logits(batch, given), mllm.answer_logits(plain, given))
        assert few(mllm, batch, given) == few(mllm, plain, given)


@torch.no_grad()
def test_a_batch_that_is_changed_is_another_one():
    mllm = tiny("llava")
    weights = place(mllm, "last MLP")
    batch = mllm.cached(mllm.batch(PROBES), weights)
    mllm.answer_logits(batch)
    for ids in (batch.target_ids.flip(1), batch.target_ids[:, :2], batch.target_ids):
        other = replace(batch, target_ids=ids, target_mask=torch.ones_like(ids))
        plain = replace(mllm.batch(PROBES), target_ids=ids, target_mask=torch.ones_like(ids))
        assert torch.equal(mllm.answer_logits(other), mllm.answer_logits(plain))
    swapped = tuple(
        replace(p, prompts=o.prompts)
        for p, o in zip(
            batch.parts,
            mllm.batch([replace(p, question="w30 " + p.question) for p in PROBES]).parts,
            strict=True,
        )
    )
    found = mllm.answer_logits(replace(batch, parts=swapped))
    want = mllm.answer_logits(
        replace(batch, parts=tuple(replace(part, prefix=None) for part in swapped), prefix=None)
    )
    assert torch.equal(found, want)


@torch.no_grad()
def test_text_that_edits_put_in_front_is_read():
    mllm = tiny("llava")
    weights = place(mllm, "last MLP")
    outside = mllm.cached(mllm.batch(PROBES), weights)
    with ContextEdit("w50 w51 ").applied(mllm):
        plain = mllm.batch(PROBES)
        batch = mllm.cached(plain, weights)
        for seed in (1, 2):
            with edit_of(mllm, weights, seed).applied(mllm):
                assert torch.equal(mllm.answer_logits(batch), mllm.answer_logits(plain))
                assert few(mllm, batch) == few(mllm, plain)
        with pytest.raises(ValueError, match="made under other edits"):
            mllm.answer_logits(outside)
    assert mllm.answer(outside) == mllm.answer(PROBES)


@torch.no_grad()
def test_an_exception_leaves_the_model_and_the_batch_as_they_were():
    mllm = tiny("llava")
    before = bits(mllm.model)
    plain = mllm.batch(PROBES)
    batch = mllm.cached(plain, place(mllm, "last MLP"))
    norm = mllm.model.model.language_model.norm

    def fail(*_):
        raise RuntimeError("stop")

    for _ in range(3):
        handle = norm.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            mllm.answer_logits(batch)
        handle.remove()
        assert not any("forward" in m.__dict__ for m in mllm.model.modules())
        assert not any(m._forward_pre_hooks for m in mllm.model.modules())
        assert torch.equal(mllm.answer_logits(batch), mllm.answer_logits(plain))
    assert same_bits(mllm.model, before)


def test_a_name_that_is_no_parameter_is_refused():
    mllm = tiny("llava")
    with pytest.raises(ValueError, match=r"fc9\.weight is no parameter of this Llava"):
        mllm.cached(mllm.batch([SEEN]), ["fc9.weight"])
