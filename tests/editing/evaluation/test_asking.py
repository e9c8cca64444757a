"""What the unedited model says is computed once for all editors, with the same bits."""

from __future__ import annotations

import pytest

from editing.edits import ContextEdit, MemoryEdit
from editing.evaluation.asking import Unedited
from editing.evaluation.outcomes import base_outcomes, edited_outcomes, kind_scores
from editing.metrics.definitions import AGREEMENT, DIVERGENCE
from tests.editing.evaluation.test_outcomes import record, shift
from tests.editing.tiny import tiny

COMPAT = ("mmedit",)


class Beside(MemoryEdit):
    """Acts beside the model, or by a hook, and changes nothing."""

    kind = "test-beside"

    def __init__(self, hooks=False):
        super().__init__()
        self.hooks = hooks

    def put(self, mllm, strict):
        away = super().put(mllm, strict)
        layer = mllm.model.get_submodule("lm_head")
        handle = layer.register_forward_hook(lambda *_: None) if self.hooks else None

        def undo():
            away()
            if handle is not None:
                handle.remove()

        return undo

    def logits(self, batch, inner):
        return inner(batch)

    def written(self, batch, decoding, inner):
        return inner(batch, decoding)

    def settings(self):
        return {}

    @classmethod
    def restored(cls, settings, tensors, about):
        return cls()


@pytest.mark.parametrize(("again", "room"), [(True, 2**20), (False, 2**20), (True, 0)])
def test_shared_outcomes_are_those_of_editors_that_share_nothing(again, room):
    mllm = tiny("llava")
    edits = [shift(mllm, 1.0), ContextEdit("w50 "), Beside(True), Beside(), None, shift(mllm, 3.0)]
    chunks = [[record(0)], [record(2), record(3)]]
    unedited = Unedited(mllm, True, again, room)
    base = [base_outcomes(mllm, chunk, COMPAT, unedited) for chunk in chunks]
    assert base == [base_outcomes(mllm, chunk, COMPAT) for chunk in chunks]
    for chunk, before in zip(chunks, base, strict=True):
        for edit in edits:
            found = edited_outcomes(mllm, chunk, edit, before, COMPAT, unedited)
            assert found == edited_outcomes(mllm, chunk, edit, before, COMPAT)
    assert len({str(x) for x in base[0]}) == 1


@pytest.mark.parametrize("hooks", [True, False])
def test_a_memory_that_changes_nothing_changes_nothing_to_the_bit(hooks, mllm):
    one = record()
    (found,) = edited_outcomes(mllm, [one], Beside(hooks), base_outcomes(mllm, [one]))
    for kind in ("text_locality", "image_locality"):
        assert kind_scores(found, kind, DIVERGENCE).total == 0
        assert kind_scores(found, kind, AGREEMENT).value == 1


def test_several_editors_ask_the_unedited_model_once(mllm, monkeypatch):
    unedited = Unedited(mllm, again=True)
    one = record()
    (weight,) = shift(mllm, 1.0).changes
    passes = []
    stock = type(mllm._packer).scored

    def count(self, batch, read, writing=False):
        found = stock(self, batch, read, writing)
        applied = mllm.model.get_parameter(weight).data_ptr() != original
        passes.append((applied, batch.prefix is not None))
        return found

    original = mllm.model.get_parameter(weight).data_ptr()
    monkeypatch.setattr(type(mllm._packer), "scored", count)
    before = base_outcomes(mllm, [one], (), unedited)
    assert passes == [(False, False)]
    passes.clear()
    for size in (1.0, 2.0, 3.0):
        edited_outcomes(mllm, [one], shift(mllm, size), before, (), unedited)
    assert passes == [(True, True)] * 3


def test_what_is_kept_has_room(mllm):
    unedited = Unedited(mllm)
    chunks = [[record(i)] for i in range(4)]
    for chunk in chunks:
        base_outcomes(mllm, chunk, (), unedited)
    known = [unedited.about(chunk) for chunk in chunks]
    assert all(unedited.knows(chunk, False) for chunk in known)
    local = unedited.kept(known[0], False)
    size = local.logits.numel() * local.logits.element_size()
    assert local.logits.shape[0] == 4  # tokens of the two probes of locality
    unedited.room = 2 * size
    unedited.keep(known[0], False, local)
    assert [unedited.knows(chunk, False) for chunk in known] == [True, False, False, True]
