"""Batches that are packed, against the same prompts in rows of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from editing.edits import ContextEdit
from editing.requests import Probe
from tests.editing.prefix_cases import edit_of, few, gradients, place, shared
from tests.editing.tiny import BARE, OTHER, SEEN, tiny

MORE = [
    SEEN,
    BARE,
    OTHER,
    Probe("w30 w31", "w32", SEEN.image),
    Probe("w6 w31 w33 w34", "w33 w20 w21 w22", SEEN.image),
    SEEN,  # the same prompt
    Probe("w31", "w9", OTHER.image),
]
NAMES = ("llava", "llava-onevision")


def both(mllm, asked=MORE):
    batch = mllm.batch(asked)
    return batch.packed(), batch


def packed(mllm, batch):
    return mllm._packer._packing(batch, True) is not None


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_scores_are_those_of_rows(name):
    mllm = tiny(name, torch.float64)
    batch, rows = both(mllm)
    assert packed(mllm, batch)
    assert not packed(mllm, rows)
    counts = batch.target_mask.bool()
    found, want = mllm.answer_logits(batch), mllm.answer_logits(rows)
    assert found.shape == want.shape
    torch.testing.assert_close(found[counts], want[counts], rtol=1e-10, atol=1e-10)
    each = [mllm.answer_logits(mllm.batch([probe]))[0] for probe in MORE]
    for row, alone in enumerate(each):
        n = int(counts[row].sum())
        torch.testing.assert_close(found[row, :n], alone[:n], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_is_written_is_what_rows_write(name):
    mllm = shared(name)
    batch, rows = both(mllm)
    assert few(mllm, batch) == few(mllm, rows)
    assert mllm.answer(batch, 1) == mllm.answer(rows, 1)
    assert mllm.answer(batch, 6) == [mllm.answer([probe], 6)[0] for probe in MORE]


@pytest.mark.parametrize("region", ["last vision layer", "last MLP", "projector"])
def test_gradients_are_those_of_rows(region):
    mllm = tiny("llava", torch.float64)
    weights = place(mllm, region)
    found, want = (gradients(mllm, batch, weights) for batch in both(mllm))
    for a, b in zip(found, want, strict=True):
        # Llama's norms compute in float32, whatever the model's dtype.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))
        assert b.abs().max() > 0


@torch.no_grad()
def test_an_end_ends_its_own_row_alone():
    mllm = tiny("llava")
    batch, rows = both(mllm)
    said = mllm.answer(rows, 6)
    end = mllm.tokenizer.convert_tokens_to_ids(said[0].split()[2])
    for config in (mllm.model.generation_config,):
        config.eos_token_id = [*mllm.backbone.ends, end]
    batch, rows = both(mllm)
    shorter = mllm.answer(rows, 6)
    assert shorter != said
    assert mllm.answer(batch, 6) == shorter


@torch.no_grad()
def test_scores_and_answers_at_once_are_those_of_either(monkeypatch):
    monkeypatch.setattr("editing.mllm.WRITTEN", 4)
    mllm = shared("llava")
    for batch in both(mllm):
        logits, said = mllm.scored_answers(batch)
        assert torch.equal(logits, mllm.answer_logits(batch))
        assert said == mllm.answer(batch) == mllm.answers(batch, logits)
        bare, nothing = mllm.scored_answers(batch, max_tokens=0)
        assert torch.equal(bare, logits)
        assert nothing == []
    with ContextEdit("w50 w51 ").applied(mllm):
        batch = mllm.batch(MORE).packed()
        logits, said = mllm.scored_answers(batch)
        assert torch.equal(logits, mllm.answer_logits(batch))
        assert said == mllm.answer(batch)


@torch.no_grad()
def test_an_answer_that_is_the_target_is_not_written(monkeypatch):
    mllm = shared("llava")
    batch = mllm.batch(MORE).packed()
    own = mllm.answer_logits(batch)
    hit = replace(batch, target_ids=own.argmax(-1)[:, :1], target_mask=batch.target_mask[:, :1])
    monkeypatch.setattr("editing.packed.packing.written", None)
    assert mllm.scored_answers(hit)[1] == mllm.target_texts(hit)
    with pytest.raises(TypeError):
        mllm.scored_answers(batch)


@torch.no_grad()
def test_cached_batches_give_the_same_bits_under_edits():
    mllm = tiny("llava")
    weights = place(mllm, "last MLP")
    plain = mllm.batch(MORE).packed()
    batch = mllm.cached(plain, weights)
    before = mllm.scored_answers(batch, 4)
    for seed in (1, 2):
        with edit_of(mllm, weights, seed).applied(mllm):
            found, want = (mllm.scored_answers(b, 4) for b in (batch, plain))
            assert torch.equal(found[0], want[0])
            assert found[1] == want[1]
            assert not torch.equal(found[0], before[0])
        again = mllm.scored_answers(batch, 4)
        assert torch.equal(again[0], before[0])
        assert again[1] == before[1]


@torch.no_grad()
def test_where_a_module_is_hooked_prompts_have_rows_of_their_own():
    mllm = tiny("llava")
    batch, rows = both(mllm)
    want, said = mllm.answer_logits(rows), few(mllm, rows)
    seen = []
    layer = mllm.model.model.language_model.layers[0]
    handle = layer.register_forward_hook(lambda m, a, o: seen.append(len(a[0])))
    assert mllm.hooked
    assert torch.equal(mllm.answer_logits(batch), want)
    assert seen == [6, 1]
    assert few(mllm, batch) == said
    handle.remove()
    assert not mllm.hooked
    assert packed(mllm, batch)


@torch.no_grad()
def test_models_with_windows_or_masks_of_their_own_are_left_alone():
    mllm = tiny("llava")
    text = mllm.model.config.text_config
    assert mllm.backbone.packs is not None
    text._attn_implementation = "eager"
    assert mllm.backbone.packs is None
    text._attn_implementation = "sdpa"
    text.sliding_window = 8
    assert mllm.backbone.packs is None


def test_few_prompts_that_share_nothing_are_not_packed():
    mllm = shared("llava")
    assert not packed(mllm, mllm.batch([SEEN]).packed())
    assert not packed(mllm, mllm.batch([SEEN, OTHER]).packed())
