"""What need not be computed: answers that are known from scores, and images seen already."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from editing.requests import Probe
from tests.editing.tiny import BARE, MODELS, OTHER, PROBES, SEEN, WIDE, tiny


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_an_answer_that_scores_highest_is_not_written(name, monkeypatch):
    mllm = tiny(name)
    monkeypatch.setattr("editing.mllm.WRITTEN", 4)
    plain = mllm.batch(PROBES)
    said = mllm.answer(plain)
    # The targets of some rows are made what the model says, as ids: texts may be read otherwise.
    written, asked_for = type(mllm.backbone).written, []

    def count(self, stock, context, decoding):
        ids = written(self, stock, context, decoding)
        asked_for.append(ids)
        return ids

    monkeypatch.setattr(type(mllm.backbone), "written", count)
    mllm.answer(mllm.batch([SEEN]))
    own = asked_for.pop()
    ids = torch.zeros(5, max(own.shape[1], plain.target_ids.shape[1]), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    ids[:, : plain.target_ids.shape[1]], mask[:, : plain.target_ids.shape[1]] = (
        plain.target_ids,
        plain.target_mask,
    )
    ids[0], mask[0] = 0, 0
    ids[0, : own.shape[1]], mask[0, : own.shape[1]] = own[0], 1
    batch = replace(plain, target_ids=ids, target_mask=mask)
    logits = mllm.answer_logits(batch)
    hit = ((logits.argmax(-1) == ids) | (mask == 0)).all(1)
    assert bool(hit[0])
    assert not bool(hit.all())
    assert mllm.answers(batch, logits) == said
    assert sum(map(len, asked_for)) == 5 - int(hit.sum())


@torch.no_grad()
def test_nothing_is_written_where_every_target_scores_highest(monkeypatch):
    mllm = tiny("llava")
    batch = mllm.batch(PROBES)
    logits = F.one_hot(batch.target_ids, 60).float()
    monkeypatch.setattr(mllm.backbone, "written", None)
    assert mllm.answers(batch, logits) == mllm.target_texts(batch)
    logits[2, 1] = 0.0  # of the end token: "w22 ..." goes on
    with pytest.raises(TypeError):
        mllm.answers(batch, logits)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_an_image_of_several_questions_is_seen_once(name, monkeypatch):
    mllm = tiny(name)
    again = Probe("w30 w31", "w32", replace(SEEN.image))
    probes = [SEEN, OTHER, BARE, again, replace(OTHER, question="w9 w9 w9")]
    seen, stock = [], mllm.backbone.image_tokens

    def count(model, pixels, sizes=None):
        seen.append(len(pixels))
        return stock(model, pixels, sizes)

    batch = mllm.batch(probes)
    mllm.backbone.image_tokens = count
    together = mllm.answer_logits(batch)
    assert seen == [2]
    del mllm.backbone.image_tokens
    apart = replace(batch, parts=tuple(replace(part, images=None) for part in batch.parts))
    torch.testing.assert_close(together, mllm.answer_logits(apart), rtol=1e-5, atol=2e-5)
    rows = [4, 2, 3, 0]
    some = batch.chosen(rows)
    assert some.probes == tuple(probes[i] for i in rows)
    torch.testing.assert_close(mllm.answer_logits(some), together[rows], rtol=1e-5, atol=2e-5)
    said = mllm.answer(batch, 3)
    assert mllm.answer(some, 3) == [said[i] for i in rows]


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl"])
@torch.no_grad()
def test_an_image_with_a_size_of_its_own_is_seen_once(name, monkeypatch):
    mllm = tiny(name, torch.float64)
    again = Probe("w30 w31", "w32", replace(WIDE.image))
    probes = [WIDE, SEEN, BARE, again, replace(SEEN, question="w9 w9 w9")]
    seen, stock = [], mllm.model.get_image_features

    def count(patches, grid, **options):
        seen.append(len(grid))
        return stock(patches, grid, **options)

    monkeypatch.setattr(mllm.model, "get_image_features", count)
    batch = mllm.batch(probes)
    counts = batch.target_mask.bool()
    together = mllm.answer_logits(batch)
    assert seen.pop() == 2
    apart = replace(batch, parts=tuple(replace(part, images=None) for part in batch.parts))
    separate = mllm.answer_logits(apart)
    assert seen == [4]
    torch.testing.assert_close(together[counts], separate[counts], rtol=1e-5, atol=1e-5)
    assert mllm.answer(batch, 3) == mllm.answer(apart, 3)
