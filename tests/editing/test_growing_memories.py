"""Memories that act inside the model, as edits: in files, extended, joined, nested, refused."""

from __future__ import annotations

import json

import pytest
import torch

from editing.edits import ContextEdit, EditError, StackedEdit, load
from editing.inside import Inside
from mmtune.backbones.base import SiteError
from tests.editing.memories import OPTIONS, fact, memory_editor, request, taught
from tests.editing.tiny import BARE, PROBES, bits, made, same_bits, tiny

EVERY = pytest.mark.parametrize("kind", OPTIONS)


def scores(mllm, probes=PROBES):
    return mllm.answer_logits(mllm.batch(probes))


def told(mllm, asked):
    return mllm.answer(asked, max_tokens=4)


def hooks(mllm):
    """Ours; transformers has some of its own, which record outputs."""
    every = (h for m in mllm.model.modules() for h in m._forward_hooks.values())
    return sum(isinstance(getattr(h, "__self__", None), Inside) for h in every)


@EVERY
@torch.no_grad()
def test_saved_and_loaded_is_the_same_edit(kind, tmp_path):
    mllm = tiny("llava")
    edit = memory_editor(kind, steps=3).edit(mllm, [fact(), request(30), fact(image=False)])
    edit.save(tmp_path / "edit")
    loaded = load(tmp_path / "edit")
    assert type(loaded) is type(edit)
    assert loaded.about == json.loads(json.dumps(edit.about))
    loaded.save(tmp_path / "again")
    for file in ("edit.json", "edit.safetensors"):
        assert (tmp_path / "edit" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    probes, found = [fact(), request(30), *PROBES], []
    for one in (edit, loaded):
        other = tiny("llava")
        with one.applied(other):
            found.append((scores(other, probes), told(other, probes)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert not torch.equal(found[0][0][:2], scores(mllm, probes)[:2])


@EVERY
@torch.no_grad()
def test_bf16(kind):
    mllm = tiny("blip2-opt", torch.bfloat16)
    before, base = bits(mllm.model), scores(mllm)
    edit = taught(kind, "blip2-opt", torch.bfloat16)
    assert all(t.dtype in (torch.float32, torch.bool) for t in edit.tensors().values())
    with edit.applied(mllm):
        assert told(mllm, [fact()]) == [fact().target]
        assert torch.equal(scores(mllm)[:2], base[:2])
    assert same_bits(mllm.model, before)


@EVERY
@torch.no_grad()
def test_twenty_edits_later_the_first_still_holds(kind):
    mllm = tiny("llava")
    edit, base = taught(kind), scores(mllm)
    later = memory_editor(kind, steps=2)
    for i in range(30, 50, 5):
        edit = later.extend(mllm, edit, [request(j) for j in range(i, i + 5)])
    assert [r["id"] for r in edit.about["requests"]] == ["23", *map(str, range(30, 50))]
    assert type(edit).kind == kind
    with edit.applied(mllm):
        assert hooks(mllm) == 1
        assert told(mllm, [fact()]) == [fact().target]
        if kind != "wise":  # whose routers two steps do not train
            assert torch.equal(scores(mllm), base)


@EVERY
@torch.no_grad()
def test_two_memories_join_and_other_edits_are_stacked(kind):
    mllm = tiny("llava")
    first = memory_editor(kind, steps=6).edit(mllm, [fact()])
    second = memory_editor(kind, steps=6).edit(mllm, [request(30)])
    both, probes = first.then(second), [fact(), request(30), *PROBES]
    assert type(both) is type(first)
    assert [r["id"] for r in both.about["requests"]] == ["23", "30"]
    with first.applied(mllm), second.applied(mllm):
        want = scores(mllm, probes)
    with both.applied(mllm):
        torch.testing.assert_close(scores(mllm, probes), want, rtol=1e-5, atol=1e-5)
    with first.applied(mllm):
        assert not torch.equal(scores(mllm, probes)[1], want[1])
    assert isinstance(first.then(ContextEdit("w30 ")), StackedEdit)
    other = memory_editor(kind, steps=1, layer=-1).edit(mllm, [request(30)])
    assert isinstance(first.then(other), StackedEdit)
    assert isinstance(
        memory_editor(kind, steps=1, layer=-1).extend(mllm, first, [BARE_FACT]), StackedEdit
    )


BARE_FACT = request(31, image=False)


@torch.no_grad()
def test_memories_nest_with_each_other_and_with_weights():
    """One memory's features are read while another is told of the question; neither minds."""
    mllm = tiny("llava")
    edits = [memory_editor(k, steps=6).edit(mllm, [fact()]) for k in ("liveedit", "grace")]
    for inner, outer in (edits, edits[::-1]):
        with inner.applied(mllm):
            alone = scores(mllm, [request(30), BARE, fact()])
            with outer.applied(mllm), made(mllm).applied(mllm):
                assert told(mllm, [fact(), *PROBES])
            with outer.applied(mllm):
                both = scores(mllm, [request(30), BARE, fact()])
            assert torch.equal(alone[:2], both[:2])
            assert not torch.equal(alone[2], both[2])
    assert hooks(mllm) == 0


@EVERY
@torch.no_grad()
def test_another_model_is_refused(kind):
    edit = memory_editor(kind, steps=1).edit(tiny("llava"), [fact()])
    with pytest.raises(EditError, match=r"is not the kind of model.*has no model\.language"):
        edit.put(tiny("blip2-opt"), strict=True)
    changed = tiny("llava")
    changed.model.get_parameter(next(iter(edit.made_on.weights))).data.mul_(2)
    with pytest.raises(EditError, match="is not the model that this edit was made on"):
        edit.put(changed, strict=True)
    with edit.applied(changed, strict=False):
        assert hooks(changed) == 1
    assert hooks(changed) == 0


def test_an_encoder_is_no_place():
    with pytest.raises(SiteError, match=r"layer 1 of tiny blip2-t5 is its encoder's.*2\.\.3"):
        memory_editor("grace", layer=1).edit(tiny("blip2-t5"), [fact()])
