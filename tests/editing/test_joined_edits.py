"""Edits that become one: what `then` gives does alone what two do one after the other."""

from __future__ import annotations

import itertools

import pytest
import torch

from editing.changes import Delta, LowRank, Replacement
from editing.edits import ContextEdit, StackedEdit, load
from editing.methods.base import editor
from editing.methods.finetune import FineTuneOptions
from editing.weight_edits import WeightEdit
from tests.editing.tiny import PROBES, REQUEST, SECOND, bits, drawn, made, paths, same_bits, tiny

FORMS = {
    "delta": lambda seed: Delta(drawn((6, 9), seed)),
    "low rank": lambda seed: LowRank(drawn((6, 1), seed), drawn((1, 9), seed + 1)),
    "value": lambda seed: Replacement(drawn((6, 9), seed)),
}


@pytest.mark.parametrize(("first", "second"), list(itertools.product(FORMS, FORMS)))
def test_changes_follow_each_other(first, second):
    weight = drawn((6, 9), 0).double()
    one, two = FORMS[first](1), FORMS[second](5)
    found = one.then(two).on(weight)
    torch.testing.assert_close(found, two.on(one.on(weight)), rtol=1e-6, atol=1e-6)


def test_factors_stay_factors_while_they_are_smaller():
    """Ranks 1 and 2 of 6 x 9: 3 * 15 numbers are fewer than 54, 4 * 15 are not."""
    three = FORMS["low rank"](1).then(FORMS["low rank"](3)).then(FORMS["low rank"](5))
    assert isinstance(three, LowRank)
    assert three.left.shape == (6, 3)
    assert isinstance(three.then(FORMS["low rank"](7)), Delta)


def test_small_changes_of_a_bf16_weight_are_summed_before_they_are_rounded():
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    step = Delta(torch.full((1, 1), 2.0**-10))
    joint = step
    for _ in range(7):
        assert torch.equal(step.on(weight), weight)
        joint = joint.then(step)
    assert joint.on(weight).item() == 1 + 2.0**-7


@torch.no_grad()
def test_weight_edits_add_up_and_are_of_the_unedited_model(tmp_path):
    mllm = tiny("llava")
    before = bits(mllm.model)
    first = WeightEdit.of(mllm, {paths(mllm)[0]: made(mllm).changes[paths(mllm)[0]]})
    with first.applied(mllm):
        second = made(mllm, seed=7)
        second.about = {"requests": [{"id": "b"}]}
        with second.applied(mllm):
            want = mllm.answer_logits(mllm.batch(PROBES))
    first.about = {"requests": [{"id": "a"}]}
    first.then(second).save(tmp_path / "edit")
    joint = load(tmp_path / "edit")
    assert joint.about["requests"] == [{"id": "a"}, {"id": "b"}]
    with joint.applied(mllm):
        found = mllm.answer_logits(mllm.batch(PROBES))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert same_bits(mllm.model, before)


def test_edits_of_two_kinds_are_stacked():
    mllm = tiny("llava")
    joint = made(mllm).then(ContextEdit("w30 "))
    assert isinstance(joint, StackedEdit)
    assert [edit.kind for edit in joint.edits] == ["weights", "context"]


def test_sequential_editing_keeps_the_first_edit():
    mllm = tiny("llava")
    before = bits(mllm.model)
    tuner = editor("ft", FineTuneOptions(steps=40, lr=3e-3))
    edit = tuner.edit(mllm, [REQUEST])
    both = tuner.extend(mllm, edit, [SECOND])
    assert isinstance(both, WeightEdit)
    assert [r["id"] for r in both.about["requests"]] == ["r0", "r1"]
    with edit.applied(mllm):
        alone = tuner.edit(mllm, [SECOND])
    for name, change in both.changes.items():
        want = edit.changes[name].dense() + alone.changes[name].dense()
        torch.testing.assert_close(change.dense(), want)
    with both.applied(mllm):
        assert mllm.answer([SECOND]) == ["w42"]
    assert same_bits(mllm.model, before)
