"""Edits of every kind: applied, undone to the bit, saved, loaded, stacked, refused."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file

from editing.changes import Delta
from editing.edits import ContextEdit, EditError, MemoryEdit, load, stack
from editing.mllm import MLLM
from editing.weight_edits import WeightEdit
from tests.editing.tiny import (
    BARE,
    MODELS,
    OTHER,
    PROBES,
    SEEN,
    bits,
    drawn,
    made,
    paths,
    same_bits,
    tiny,
)

DTYPES = [torch.float32, torch.bfloat16]


def scores(mllm, probes=PROBES):
    return mllm.answer_logits(mllm.batch(probes))


class Remembered(MemoryEdit):
    """Answers one question from memory; other questions pass."""

    kind = "tests.remembered"

    def __init__(self, question, logits, about=None):
        super().__init__(about)
        self.question, self.table = question, logits

    def logits(self, batch, inner):
        found = inner(batch).clone()
        for row, probe in enumerate(batch.probes):
            if probe.question == self.question:
                found[row] = self.table
        return found

    def written(self, batch, decoding, inner):
        said = inner(batch, decoding)
        return [
            "remembered" if p.question == self.question else text
            for p, text in zip(batch.probes, said, strict=True)
        ]

    def settings(self):
        return {"question": self.question}

    def tensors(self):
        return {"table": self.table}

    @classmethod
    def restored(cls, settings, tensors, about):
        return cls(settings["question"], tensors["table"], about)


KINDS = {
    "weights": made,
    "context": lambda mllm: ContextEdit("w30 w31 "),
    "memory": lambda mllm: Remembered(SEEN.question, drawn((60,), 3)),
    "stack": lambda mllm: stack([made(mllm, 1), ContextEdit("w33 "), made(mllm, 2, 2)]),
}
EVERY = pytest.mark.parametrize("kind", KINDS)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*MODELS, "minigpt4", "qwen3-vl"])
@torch.no_grad()
def test_applied_changes_answers_and_leaves_every_bit(name, dtype, kind):
    mllm = tiny(name, dtype)
    before, base, said = bits(mllm.model), scores(mllm), mllm.answer(PROBES)
    edit = KINDS[kind](mllm)
    assert same_bits(mllm.model, before)
    for _ in range(2):
        with edit.applied(mllm) as inside:
            assert inside is mllm
            edited = scores(mllm)
            assert (edited - base)[0].abs().max() > 0.01
            assert mllm.answer(PROBES) != said
        assert same_bits(mllm.model, before)
        assert torch.equal(scores(mllm), base)
        assert mllm.around == []


@EVERY
@torch.no_grad()
def test_saved_and_loaded_is_the_same_edit(kind, tmp_path):
    mllm = tiny("llava")
    edit = KINDS[kind](mllm)
    edit.about["note"] = {"requests": [{"target": "w5", "ünï": None}]}
    edit.save(tmp_path / "edit")
    loaded = load(tmp_path / "edit")
    assert type(loaded) is type(edit)
    assert loaded.about == edit.about
    found = []
    for one in (edit, loaded):
        with one.applied(tiny("llava")) as other:
            found.append((scores(other), other.answer(PROBES)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    loaded.save(tmp_path / "again")
    files = [p.relative_to(tmp_path / "edit") for p in (tmp_path / "edit").rglob("*.*")]
    assert all(
        (tmp_path / "edit" / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files
    )
    assert not list(tmp_path.glob(".*"))


@torch.no_grad()
def test_forms_do_what_they_say(tmp_path):
    mllm = tiny("llava")
    edit = made(mllm)
    names = list(edit.changes)
    before = {n: mllm.model.get_parameter(n).clone() for n in names}
    with edit.applied(mllm):
        now = {n: mllm.model.get_parameter(n).clone() for n in names}
    first, second, third, fourth = names
    assert torch.equal(now[first], before[first] + edit.changes[first].delta)
    low = edit.changes[second]
    assert torch.equal(now[second], before[second] + low.left @ low.right)
    assert torch.equal(now[third], edit.changes[third].value)
    assert torch.equal(now[fourth], before[fourth] + edit.changes[fourth].delta)
    edit.save(tmp_path / "edit")
    held = load_file(tmp_path / "edit" / "edit.safetensors")
    assert sorted(held) == sorted(
        [f"{first}/delta", f"{second}/left", f"{second}/right", f"{third}/value", f"{fourth}/delta"]
    )


@torch.no_grad()
def test_bf16_weights_are_changed_by_float32_sums():
    mllm = tiny("llava", torch.bfloat16)
    edit = made(mllm)
    name, change = next(iter(edit.changes.items()))
    weight = mllm.model.get_parameter(name).clone()
    with edit.applied(mllm):
        now = mllm.model.get_parameter(name).clone()
    assert torch.equal(now, (weight.float() + change.delta).bfloat16())


@EVERY
@torch.no_grad()
def test_an_exception_inside_leaves_every_bit(kind):
    mllm = tiny("blip2-opt", torch.bfloat16)
    before, base = bits(mllm.model), scores(mllm)
    edit = KINDS[kind](mllm)

    def fail():
        with edit.applied(mllm):
            assert not torch.equal(scores(mllm), base)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert same_bits(mllm.model, before)
    assert torch.equal(scores(mllm), base)
    with edit.applied(mllm):  # it can be applied again
        assert not torch.equal(scores(mllm), base)


@torch.no_grad()
def test_a_change_that_fails_half_way_changes_nothing():
    mllm = tiny("llava")
    edit = made(mllm)
    broken = list(edit.changes)[-1]

    class Failing(Delta):
        def on(self, weight):
            raise RuntimeError("out of memory")

    edit.changes[broken] = Failing(edit.changes[broken].delta)
    before = bits(mllm.model)
    both = stack([made(mllm, 5), edit])
    for one in (edit, both):
        with pytest.raises(RuntimeError, match="out of memory"), one.applied(mllm):
            pass
        assert same_bits(mllm.model, before)


@torch.no_grad()
def test_nested_edits_add_up_and_peel_off():
    mllm = tiny("llava")
    first, second = made(mllm, 1), made(mllm, 2, 2)
    states, base = [bits(mllm.model)], scores(mllm)
    with first.applied(mllm):
        states.append(bits(mllm.model))
        with second.applied(mllm):
            name = next(iter(second.changes))
            whole = first.changes[name].on(tiny("llava").model.get_parameter(name))
            assert torch.equal(mllm.model.get_parameter(name), second.changes[name].on(whole))
            nested = scores(mllm)
        assert same_bits(mllm.model, states[1])
    assert same_bits(mllm.model, states[0])
    with stack([first, second]).applied(mllm):
        assert torch.equal(scores(mllm), nested)
    with stack([second, first]).applied(mllm):  # the last replacement wins
        assert not torch.equal(scores(mllm), nested)
    assert torch.equal(scores(mllm), base)


@EVERY
@torch.no_grad()
def test_an_edit_is_not_applied_twice_at_once(kind):
    mllm = tiny("llava")
    before, edit = bits(mllm.model), KINDS[kind](mllm)
    with edit.applied(mllm):
        inside = scores(mllm)
        with pytest.raises(EditError, match="is applied to tiny llava already"), edit.applied(mllm):
            pass
        assert torch.equal(scores(mllm), inside)
        with edit.applied(tiny("llava")) as other:  # another model is another matter
            assert torch.equal(scores(other), inside)
    assert same_bits(mllm.model, before)
    with pytest.raises(EditError, match="cannot be stacked on itself"):
        stack([edit, edit])


@torch.no_grad()
def test_edits_left_in_the_wrong_order_are_all_undone():
    mllm = tiny("llava")
    before, base = bits(mllm.model), scores(mllm)
    outer, inner, later = made(mllm, 1), stack([made(mllm, 2), ContextEdit("w9 ")]), made(mllm, 3)
    first, second = ExitStack(), ExitStack()
    first.enter_context(outer.applied(mllm))
    second.enter_context(inner.applied(mllm))
    second.enter_context(later.applied(mllm))
    with pytest.raises(EditError, match="left while 2 that were applied after it"):
        first.close()
    assert same_bits(mllm.model, before)
    assert torch.equal(scores(mllm), base)
    second.close()
    assert same_bits(mllm.model, before)
    with outer.applied(mllm), inner.applied(mllm):
        assert not torch.equal(scores(mllm), base)


@torch.no_grad()
def test_two_views_of_one_model_share_its_edits():
    mllm = tiny("llava")
    other = MLLM.__new__(MLLM)
    other.__dict__ = {**mllm.__dict__, "around": []}
    edit = made(mllm)
    with edit.applied(mllm), pytest.raises(EditError, match="already"), edit.applied(other):
        pass


@torch.no_grad()
def test_context_is_what_the_user_says_first():
    edit = ContextEdit("w30 w31 ")
    for name, want in (
        ("llava", [1, 0, 59, 59, 59, 59, 30, 31, 5, 9, 7, 8]),
        ("blip2-opt", [1, 30, 31, 0, 5, 9, 7, 8]),
    ):
        mllm = tiny(name)
        plain = mllm.batch([SEEN, BARE])
        with edit.applied(mllm), ContextEdit("w33 ").applied(mllm):
            assert mllm.batch([SEEN]).prefaces == ("w30 w31 w33 ",)
        with edit.applied(mllm):
            seen, bare = mllm.batch([SEEN, BARE]).parts
            for use in (mllm.answer_logits, mllm.nll, mllm.answer, mllm.sequences):
                with pytest.raises(ValueError, match="made under other edits"):
                    use(plain)
        assert seen.prompts["input_ids"][0, : len(want)].tolist() == want
        words = bare.prompts["input_ids"][0].tolist()
        assert words[words.index(30) :][:2] == [30, 31]
        assert words.index(10) - words.index(31) == (1 if name == "llava" else 2)
        assert words[: words.index(30)] == ([1, 0] if name == "llava" else [1])


@torch.no_grad()
def test_memory_answers_its_own_question_alone():
    mllm = tiny("blip2-t5")
    base, said = scores(mllm), mllm.answer(PROBES)
    edit = Remembered(SEEN.question, drawn((60,), 3))
    with edit.applied(mllm):
        found = scores(mllm)
        assert torch.equal(found[1:], base[1:])
        assert torch.equal(found[0], edit.table.expand_as(found[0]))
        assert mllm.answer(PROBES) == ["remembered", *said[1:]]
        second = Remembered(OTHER.question, drawn((60,), 4))
        with second.applied(mllm):
            assert mllm.answer(PROBES) == ["remembered", said[1], "remembered", *said[3:]]
        with pytest.raises(TypeError, match="changes answers only"):
            mllm.sequences(mllm.batch([SEEN]))


@torch.no_grad()
def test_another_model_is_refused(tmp_path):
    mllm = tiny("llava")
    made(mllm).save(tmp_path / "edit")
    edit = load(tmp_path / "edit")
    name = next(iter(edit.changes))

    other = tiny("llava")
    other.model.get_parameter(name).data[0, 0] += 1e-3
    before = bits(other.model)
    with pytest.raises(EditError, match=rf"tiny llava is not the model.*{name}.*has other values"):
        edit.applied(other).__enter__()
    assert same_bits(other.model, before)
    with edit.applied(other, strict=False):
        assert not same_bits(other.model, before)
    assert same_bits(other.model, before)

    with pytest.raises(EditError, match=r"bfloat16, was float32.*has another dtype.*same dtype"):
        edit.applied(tiny("llava", torch.bfloat16)).__enter__()
    for strict in (True, False):
        with pytest.raises(EditError, match=r"not the kind of model.*is no parameter of it"):
            edit.applied(tiny("blip2-opt"), strict).__enter__()
    small = {name: Delta(torch.zeros(3, 3))}
    with pytest.raises(EditError, match=rf"{name} \(\[.*, expected \[3, 3\]\) has another shape"):
        WeightEdit.of(mllm, small)
    # A weight that the edit does not touch may differ: the edit means the same there.
    other = tiny("llava")
    other.model.lm_head.weight.data[0, 0] += 1
    with edit.applied(other):
        pass


@torch.no_grad()
def test_an_edit_made_under_another_knows_the_model_without_it():
    mllm = tiny("llava")
    first = made(mllm, 1)
    alone = made(mllm, 2)
    with first.applied(mllm):
        second = made(mllm, 2)
    assert second.made_on == alone.made_on
    with second.applied(mllm):
        pass
    with stack([first, second]).applied(mllm):
        pass


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_change_that_diverged_is_refused(bad):
    mllm = tiny("llava")
    path = paths(mllm)[0]
    delta = torch.zeros(mllm.model.get_parameter(path).shape)
    delta[1, 1] = bad
    with pytest.raises(EditError, match="not finite: the edit diverged"):
        WeightEdit.of(mllm, {path: Delta(delta)})
