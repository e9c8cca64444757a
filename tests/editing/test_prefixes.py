"""Batches that are computed once below an edit's place, against plain ones."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from editing.methods.finetune import FineTune, FineTuneOptions, LoraEdit, LoraOptions
from editing.mllm import MLLM
from tests.editing.prefix_cases import (
    PLACES,
    edit_of,
    few,
    gradients,
    moved,
    place,
    same,
    shared,
)
from tests.editing.tiny import (
    BARE,
    OTHER,
    PROBES,
    REQUEST,
    SECOND,
    SEEN,
    tiny,
)

OF = {
    "blip2-opt": ("last fc2 with bias", "last attention", "Q-Former", "first vision layer"),
    "blip2-t5": ("last MLP", "T5's encoder", "vision and language"),
    "llava": tuple(p for p in PLACES if p not in ("Q-Former", "T5's encoder")),
    "qwen2": ("last attention",),
    "minigpt4": ("last MLP", "Q-Former"),
    "llava-onevision": ("last MLP", "projector"),
    "qwen2.5-vl": ("last MLP", "last vision layer"),
    "qwen3-vl": ("last attention", "projector"),
}
CASES = [pytest.param(n, p, id=f"{n}, {p}") for n, places in OF.items() for p in places]


@pytest.fixture
def computed(monkeypatch):
    """Paths of the Linears that are computed, in order; hooks would be seen by what is tested."""
    paths, seen = {}, []
    stock = nn.Linear.forward

    def forward(self, x):
        if id(self) in paths:
            seen.append(paths[id(self)])
        return stock(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)

    def of(mllm):
        paths.update({id(m): n for n, m in mllm.model.named_modules()})
        seen.clear()
        return seen

    return of


@pytest.mark.parametrize(("name", "region"), CASES)
@torch.no_grad()
def test_numbers_are_those_of_a_plain_batch(name, region):
    """To the bit: scores, gradients, answers; with other weights, and under an applied edit."""
    mllm = shared(name)
    weights = place(mllm, region)
    plain = mllm.batch(PROBES[:3])
    batch = mllm.cached(plain, weights)
    for seed in (1, 2):
        given = moved(weights, seed)
        want = mllm.answer_logits(plain, given)
        assert torch.equal(mllm.answer_logits(batch, given), want)
        assert same(gradients(mllm, batch, given), gradients(mllm, plain, given))
        assert few(mllm, batch, given) == few(mllm, plain, given)
    before = mllm.answer_logits(plain), few(mllm, plain)
    assert not torch.equal(want, before[0])
    assert torch.equal(mllm.answer_logits(batch), before[0])
    for seed in (3,):
        with edit_of(mllm, weights, seed).applied(mllm):
            assert torch.equal(mllm.answer_logits(batch), mllm.answer_logits(plain))
            assert few(mllm, batch) == few(mllm, plain)
        assert torch.equal(mllm.answer_logits(batch), before[0])
        assert few(mllm, batch) == before[1]


@pytest.mark.parametrize(
    ("name", "region"),
    [("blip2-opt", "last MLP"), ("blip2-t5", "last MLP"), ("llava", "projector")],
)
@torch.no_grad()
def test_whole_sequences_are_those_of_a_plain_batch(name, region):
    mllm = shared(name)
    weights = place(mllm, region)
    plain = mllm.batch([SEEN, OTHER])
    batch = mllm.cached(plain, weights)
    for seed in (1, 2):
        with edit_of(mllm, weights, seed).applied(mllm):
            found, want = mllm.sequences(batch), mllm.sequences(plain)
        assert torch.equal(found.logits, want.logits)
        assert torch.equal(found.labels, want.labels)
        assert torch.equal(found.mask, want.mask)


@pytest.mark.parametrize(
    ("name", "region"),
    [("blip2-opt", "last MLP"), ("blip2-t5", "projector"), ("llava", "last MLP")],
)
@torch.no_grad()
def test_bf16(name, region):
    mllm = tiny(name, torch.bfloat16)
    weights = place(mllm, region)
    plain = mllm.batch(PROBES[:3])
    batch = mllm.cached(plain, weights)
    for seed in (1, 2):
        given = moved(weights, seed)
        assert torch.equal(mllm.answer_logits(batch, given), mllm.answer_logits(plain, given))
        assert same(gradients(mllm, batch, given), gradients(mllm, plain, given))
        assert few(mllm, batch, given) == few(mllm, plain, given)


# What may still be computed when a region has changed: beginnings of paths, by model.
ABOVE = {
    ("llava", "last MLP"): ("model.language_model.layers.1.mlp", "lm_head"),
    ("llava", "last attention"): ("model.language_model.layers.1", "lm_head"),
    ("llava", "projector"): ("model.multi_modal_projector", "model.language_model", "lm_head"),
    ("blip2-opt", "last MLP"): (
        "language_model.model.decoder.layers.1.fc",
        "language_model.lm_head",
    ),
    ("blip2-opt", "Q-Former"): ("qformer.encoder.layer.1", "language_"),
    ("blip2-opt", "projector"): ("language_",),
    ("blip2-t5", "last MLP"): (
        "language_model.decoder.block.1.layer.2",
        "language_model.lm_head",
    ),
    ("blip2-t5", "T5's encoder"): (
        "language_model.encoder.block.1.layer.1",
        "language_model.decoder",
        "language_model.lm_head",
    ),
}


@pytest.mark.parametrize(("name", "region"), ABOVE)
@torch.no_grad()
def test_nothing_below_is_computed_again(name, region, computed):
    mllm = shared(name)
    weights = place(mllm, region)
    batch = mllm.cached(mllm.batch(PROBES[:3]), weights)
    ran = computed(mllm)
    mllm.answer_logits(batch)
    assert any(not path.startswith(ABOVE[name, region]) for path in ran)
    first = len(ran)
    with edit_of(mllm, weights, 1).applied(mllm):
        ran.clear()
        mllm.answer_logits(batch)
    assert 0 < len(ran) < first
    assert {path for path in ran if not path.startswith(ABOVE[name, region])} == set()


@pytest.mark.parametrize("name", ["llava", "blip2-opt"])
@torch.no_grad()
def test_a_prompt_is_read_once_and_every_new_token_by_all_layers(name, computed):
    mllm = shared(name)
    batch = mllm.cached(mllm.batch([SEEN, OTHER]), place(mllm, "last MLP"))
    ran = computed(mllm)

    def calls(layer):
        q = f"layers.{layer}.self_attn.q_proj"
        return sum(path.endswith(q) and "vision" not in path for path in ran)

    mllm.answer(batch, max_tokens=4)
    steps = calls(0)
    assert steps == calls(1) > 1
    assert any("vision" in path for path in ran)
    ran.clear()
    mllm.answer(batch, max_tokens=4)
    assert calls(0) == calls(1) == steps - 1
    assert not any("vision" in path for path in ran)


@torch.no_grad()
def test_questions_without_image_are_computed_once_for_all_visions(computed):
    mllm = tiny("llava")
    batch = mllm.cached(mllm.batch([BARE]), place(mllm, "projector"))
    ran = computed(mllm)
    want = mllm.answer_logits(batch)
    assert ran
    ran.clear()
    assert torch.equal(mllm.answer_logits(batch), want)
    assert ran == []


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("blip2-opt", partial(FineTune, FineTuneOptions(steps=3, lr=1e-2))),
        ("blip2-t5", partial(FineTune, FineTuneOptions(region="vision", steps=3, lr=1e-2))),
        ("llava", partial(LoraEdit, LoraOptions(steps=3, rank=2))),
    ],
    ids=["language", "vision", "lora"],
)
def test_fine_tuning_makes_the_edit_that_it_made_without(name, make, monkeypatch):
    mllm = tiny(name)
    found = make().edit(mllm, [REQUEST, SECOND])
    monkeypatch.setattr(MLLM, "cached", lambda self, batch, names: batch)
    want = make().edit(mllm, [REQUEST, SECOND])
    assert found.about == want.about
    assert found.about["steps"] > 0
    a, b = found.tensors(), want.tensors()
    assert list(a) == list(b)
    assert all(torch.equal(a[n], b[n]) for n in a)
