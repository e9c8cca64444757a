"""Memories that act inside the model: all that holds for each of them."""

from __future__ import annotations

import pytest
import torch

from editing.edits import EditError
from editing.inside import Inside, Passing, parts_of
from editing.requests import Probe
from mmtune.backbones.generation import Decoding
from tests.editing.memories import OPTIONS, fact, memory_editor, taught
from tests.editing.tiny import BARE, PROBES, SEEN, bits, same_bits, tiny

NAMES = ("blip2-opt", "blip2-t5", "llava", "qwen2")
FOUND = [*((name, kind) for name in NAMES for kind in OPTIONS), ("qwen3-vl", "grace")]
FOUND += [("qwen3-vl", "liveedit"), ("minigpt4", "wise")]
EVERY = pytest.mark.parametrize("kind", OPTIONS)


def scores(mllm, probes=PROBES):
    return mllm.answer_logits(mllm.batch(probes))


def told(mllm, asked):
    return mllm.answer(asked, max_tokens=4)


def hooks(mllm):
    """Ours; transformers has some of its own, which record outputs."""
    every = (h for m in mllm.model.modules() for h in m._forward_hooks.values())
    return sum(isinstance(getattr(h, "__self__", None), Inside) for h in every)


@pytest.mark.parametrize(("name", "kind"), FOUND)
def test_the_target_is_written_and_all_else_keeps_every_bit(name, kind):
    mllm, asked = tiny(name), [fact(name)]
    before, base, said = bits(mllm.model), scores(mllm), told(mllm, PROBES)
    assert told(mllm, asked) != [asked[0].target]
    edit = taught(kind, name)
    assert edit.about["said"]
    assert edit.about["requests"][0]["id"] == asked[0].id
    assert same_bits(mllm.model, before)
    for _ in range(2):
        with edit.applied(mllm):
            assert hooks(mllm) == 1
            mixed = [*PROBES[:2], *asked, *PROBES[2:]]
            answers = told(mllm, mixed)
            assert answers[2] == asked[0].target
            assert [*answers[:2], *answers[3:]] == said
            assert torch.equal(scores(mllm), base)
        assert hooks(mllm) == 0
        assert mllm.around == []
        assert same_bits(mllm.model, before)
        assert torch.equal(scores(mllm), base)


@EVERY
@pytest.mark.parametrize("name", ["blip2-t5", "llava"])
@torch.no_grad()
def test_a_batch_is_what_its_questions_are_alone(name, kind):
    mllm = tiny(name)
    edit = taught(kind, name)
    probes = [Probe(fact(name).question, "w20 w21", fact(name).image), *PROBES]
    base = scores(mllm, probes)
    with edit.applied(mllm):
        together, answers = scores(mllm, probes), told(mllm, probes)
        for row, probe in enumerate(probes):
            alone = scores(mllm, [probe])[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-4, atol=1e-4)
            assert told(mllm, [probe]) == [answers[row]]
        assert (together - base)[0].abs().max() > 0.01
        assert torch.equal(together[1:], base[1:])
        # What is written first is the likeliest in the scores, whatever answer these read.
        firsts = mllm.batch(
            [Probe(p.question, t, p.image) for p, t in zip(probes, answers, strict=True)]
        )
        first = together[:, 0].argmax(-1)
        worded = [row for row, text in enumerate(answers) if text and first[row] > 2]
        assert 0 in worded
        assert torch.equal(first[worded], firsts.target_ids[worded, 0])


@EVERY
@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
@torch.no_grad()
def test_every_written_token_is_the_likeliest_of_its_score(name, kind):
    mllm, asked = tiny(name), fact(name)
    with taught(kind, name).applied(mllm):
        batch = mllm.batch([asked])
        likeliest = scores(mllm, [asked]).argmax(-1)
        assert torch.equal(
            likeliest[batch.target_mask > 0], batch.target_ids[batch.target_mask > 0]
        )
        assert told(mllm, [asked]) == [asked.target]


@EVERY
@pytest.mark.parametrize("name", ["blip2-t5", "llava"])
@torch.no_grad()
def test_routing_never_reads_the_answer(name, kind):
    mllm, asked = tiny(name), fact(name)
    with taught(kind, name).applied(mllm):
        found = [
            scores(mllm, [Probe(asked.question, answer, asked.image)])[:, 0]
            for answer in (asked.target + " w50", "w33 w34", "w9 w9")
        ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-5)


@EVERY
@torch.no_grad()
def test_an_exception_inside_takes_the_hook_out(kind):
    mllm = tiny("llava")
    edit, base = memory_editor(kind, steps=1).edit(mllm, [fact()]), scores(mllm)

    def fail():
        with edit.applied(mllm):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert hooks(mllm) == 0
    assert torch.equal(scores(mllm), base)

    # So does one while an edit is being made.
    class Failing(type(mllm)):
        calls = 0

        def answer_logits(self, *args, **kwargs):
            Failing.calls += 1
            if Failing.calls == 3:
                raise KeyboardInterrupt
            return super().answer_logits(*args, **kwargs)

    mllm.__class__ = Failing
    with pytest.raises(KeyboardInterrupt):
        memory_editor(kind, steps=5).edit(mllm, [fact()])
    assert hooks(mllm) == 0
    assert mllm.around == []


@EVERY
@torch.no_grad()
def test_what_is_computed_once_below_gives_the_same_numbers(kind):
    mllm = tiny("llava")
    edit, probes = taught(kind), [fact(), *PROBES]
    batch = mllm.cached(mllm.batch(probes), list(edit.made_on.weights))
    base = mllm.answer_logits(batch)
    for _ in range(2):
        with edit.applied(mllm):
            assert torch.equal(mllm.answer_logits(batch), scores(mllm, probes))
            assert told(mllm, batch) == told(mllm, probes)
        assert torch.equal(mllm.answer_logits(batch), base)


@EVERY
@pytest.mark.parametrize("name", ["blip2-t5", "llava"])
@torch.no_grad()
def test_whole_sequences_end_in_the_scores_of_answers(name, kind):
    mllm = tiny(name)
    batch = mllm.batch([fact(name), SEEN])
    base = mllm.sequences(batch).logits
    with taught(kind, name).applied(mllm):
        found = mllm.sequences(batch).logits
        answers = mllm.answer_logits(batch)
    assert torch.equal(found[1], base[1])
    torch.testing.assert_close(found[:, -answers.shape[1] :], answers, rtol=1e-5, atol=1e-5)
    assert (found - base)[0].abs().max() > 0.01


def test_columns_of_prompts_are_told_from_written_tokens():
    batch = tiny("llava").batch([BARE])
    scored = Passing(batch, batch.parts[0].rows, behind=2)
    assert scored.columns(9) == 7
    cached = Passing(batch, batch.parts[0].rows, behind=0)
    assert [cached.columns(n) for n in (7, 1, 1)] == [7, 0, 0]
    whole = Passing(batch, batch.parts[0].rows, behind=0)
    assert [whole.columns(n) for n in (1, 2, 3)] == [1, 1, 1]


@EVERY
@pytest.mark.parametrize("name", ["blip2-t5", "llava"])
@torch.no_grad()
def test_writing_without_a_cache_gives_the_same_words(name, kind):
    mllm = tiny(name)
    with taught(kind, name).applied(mllm):
        (inside,) = mllm.around
        batch = mllm.batch([fact(name), *PROBES])
        found = [
            inside.written(
                batch, Decoding(max_tokens=6, cache=cache), lambda b, d: mllm._written(None, b, d)
            )
            for cache in (True, False)
        ]
    assert found[0] == found[1]


def test_rows_of_images_are_told_from_rows_of_questions():
    batch = tiny("llava").batch([SEEN, PROBES[2], Probe("w6", "w5", SEEN.image)])
    passing = Passing(batch, batch.parts[0].rows, behind=0)
    assert passing.places(3) == [0, 1, 2]
    assert passing.places(2) == [0, 1, 0]
    with pytest.raises(EditError, match="3 questions about 2 images pass as 8 rows"):
        passing.places(8)


def test_parts_hold_each_row_once():
    batch = tiny("blip2-opt").batch(PROBES)
    parts = list(parts_of(batch))
    assert sorted(int(r) for rows, _ in parts for r in rows) == list(range(len(PROBES)))
    for rows, part in parts:
        assert [PROBES[i] for i in rows] == list(part.probes)
        assert torch.equal(part.target_ids, batch.target_ids[rows])
        assert part.parts[0].rows.tolist() == list(range(len(rows)))
