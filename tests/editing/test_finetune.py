"""Fine-tuning as an edit: the target becomes the answer, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch

from editing.changes import Delta, LowRank
from editing.edits import load
from editing.methods.base import editor, editors
from editing.methods.finetune import (
    ConstrainedOptions,
    FineTuneOptions,
    LoraOptions,
)
from editing.regions import Region, parameters_of
from editing.requests import EditRequest
from mmtune.backbones.base import SiteError
from tests.editing.tiny import MODELS, PROBES, REQUEST, SECOND, SEEN, bits, same_bits, tiny

ENOUGH = {"steps": 150, "lr": 2e-2}
CHOICES = {
    "ft": (FineTuneOptions, {}),
    "ft-l": (ConstrainedOptions, {"bound": 0.5}),
    "lora": (LoraOptions, {"rank": 4}),
}


def options(kind, **settings):
    cls, extra = CHOICES[kind]
    return cls(**{**extra, **settings})


@pytest.mark.parametrize("kind", ["ft", "ft-l", "lora"])
@pytest.mark.parametrize("region", ["vision", "language"])
@pytest.mark.parametrize("name", [*MODELS, "llava-onevision", "qwen3-vl"])
def test_the_target_becomes_the_answer(name, region, kind):
    mllm = tiny(name)
    before, asked = bits(mllm.model), [REQUEST]
    said = mllm.answer(PROBES)
    assert mllm.answer(asked) != [REQUEST.target]
    edit = editor(kind, options(kind, region=region, **ENOUGH)).edit(mllm, asked)
    assert same_bits(mllm.model, before)
    assert list(edit.changes) == list(parameters_of(mllm.backbone, region))
    assert edit.about["said"]
    assert 0 < edit.about["steps"] < ENOUGH["steps"]
    with edit.applied(mllm):
        assert mllm.answer(asked) == [REQUEST.target]
        nll = float(mllm.nll(mllm.batch(asked)).mean())
        assert nll == pytest.approx(edit.about["loss"], rel=1e-5)
        if region == "vision":  # questions without an image never pass through it
            assert [mllm.answer(PROBES)[i] for i in (1, 4)] == [said[i] for i in (1, 4)]
    assert same_bits(mllm.model, before)
    assert mllm.answer(PROBES) == said


@pytest.mark.parametrize("kind", ["ft", "lora"])
def test_bf16_weights_are_edited_and_come_back(kind, tmp_path):
    mllm = tiny("llava", torch.bfloat16)
    before = bits(mllm.model)
    edit = editor(kind, options(kind, **ENOUGH)).edit(mllm, [REQUEST])
    assert all(
        t.dtype == torch.float32 for c in edit.changes.values() for t in c.tensors().values()
    )
    edit.save(tmp_path / "edit")
    with load(tmp_path / "edit").applied(mllm):
        assert mllm.answer([REQUEST]) == [REQUEST.target]
    assert same_bits(mllm.model, before)


def test_steps_below_the_resolution_of_bf16_add_up():
    mllm = tiny("llava", torch.bfloat16)
    settings = options("ft", steps=40, lr=1e-5)
    edit = editor("ft", settings).edit(mllm, [REQUEST])
    first = editor("ft", options("ft", steps=1, lr=1e-5)).edit(mllm, [REQUEST])
    weights = parameters_of(mllm.backbone, "language")
    moved = [
        sum(int((e.changes[n].on(w) != w).sum()) for n, w in weights.items()) for e in (first, edit)
    ]
    assert moved[1] > 3 * moved[0]


def test_the_first_step_follows_the_gradient_of_the_stock_loss():
    """AdamW's first step is the learning rate times the sign of the gradient."""
    mllm = tiny("llava")
    edit = editor("ft", options("ft", steps=1, lr=1e-3)).edit(mllm, [REQUEST, SECOND])
    batches = [mllm.batch([r]) for r in (REQUEST, SECOND)]
    weights = parameters_of(mllm.backbone, "language")
    for weight in weights.values():
        weight.requires_grad_()
    (sum(mllm.nll(b)[0] for b in batches) / 2).backward()
    for name, weight in weights.items():
        clear = weight.grad.abs() > 2e-5
        assert clear.float().mean() > 0.3
        step = edit.changes[name].delta[clear]
        torch.testing.assert_close(step, -1e-3 * weight.grad[clear].sign(), rtol=1e-3, atol=0)


def test_several_requests_are_one_edit_however_they_are_batched():
    mllm = tiny("blip2-opt")
    asked = [REQUEST, SECOND, EditRequest("w10 w11 w12", "w43 w44")]
    edits = [
        editor("ft", options("ft", batch_size=size, **ENOUGH)).edit(mllm, asked) for size in (1, 3)
    ]
    for edit in edits:
        with edit.applied(mllm):
            assert mllm.answer(asked) == [r.target for r in asked]
    assert [r["id"] for r in edits[0].about["requests"]] == ["r0", "r1", ""]
    few = [
        editor("ft", options("ft", batch_size=size, steps=1)).edit(mllm, asked) for size in (1, 3)
    ]
    assert few[0].about["loss"] == pytest.approx(few[1].about["loss"], rel=1e-5)


def test_no_number_moves_further_than_the_bound():
    mllm = tiny("llava")
    free = editor("ft", options("ft", steps=20, lr=1e-2)).edit(mllm, [REQUEST])
    held = editor("ft-l", options("ft-l", steps=20, lr=1e-2, bound=0.013)).edit(mllm, [REQUEST])
    furthest = [max(float(c.delta.abs().max()) for c in e.changes.values()) for e in (free, held)]
    assert furthest[0] > 0.02
    assert furthest[1] == pytest.approx(0.013)
    assert furthest[1] <= 0.013 + 1e-9


def test_lora_keeps_its_factors():
    mllm = tiny("llava")
    edit = editor("lora", options("lora", rank=3, steps=2)).edit(mllm, [REQUEST])
    weights = parameters_of(mllm.backbone, "language")
    for name, change in edit.changes.items():
        rows, columns = weights[name].shape
        assert isinstance(change, LowRank)
        assert change.left.shape == (rows, 3)
        assert change.right.shape == (3, columns)
        delta = change.on(torch.zeros(rows, columns))
        assert torch.linalg.matrix_rank(delta) == 3
        torch.testing.assert_close(delta, change.left @ change.right)


def test_draws_come_from_the_generator_alone():
    mllm = tiny("llava")
    lora = editor("lora", options("lora", rank=2, steps=1, seed=4))

    def right(**how):
        return next(iter(lora.edit(mllm, [REQUEST], **how).changes.values())).right

    first = right()
    torch.manual_seed(77)
    state = torch.get_rng_state()
    assert torch.equal(right(), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(right(generator=torch.Generator().manual_seed(4)), first)
    assert not torch.equal(right(generator=torch.Generator().manual_seed(5)), first)


def test_an_edit_of_what_is_said_already_changes_nothing():
    mllm = tiny("llava")
    said = mllm.answer([SEEN], max_tokens=3)[0]
    edit = editor("ft", options("ft", **ENOUGH)).edit(
        mllm, [EditRequest(SEEN.question, "w40", SEEN.image)]
    )
    with edit.applied(mllm):
        again = editor("ft").edit(mllm, [EditRequest(SEEN.question, "w40", SEEN.image)])
    assert again.about["steps"] == 0
    assert all(isinstance(c, Delta) and not c.delta.any() for c in again.changes.values())
    assert said != "w40"


def test_an_edit_on_top_of_another_stacks():
    mllm = tiny("blip2-opt")
    ft = editor("ft", options("ft", **ENOUGH))
    first = ft.edit(mllm, [REQUEST])
    with first.applied(mllm):
        inside = bits(mllm.model)
        second = ft.edit(mllm, [SECOND])
        assert same_bits(mllm.model, inside)
        with second.applied(mllm):
            assert mllm.answer([SECOND]) == [SECOND.target]


def test_what_cannot_be_edited():
    mllm = tiny("llava")
    with pytest.raises(ValueError, match="at least one edit request"):
        editor("ft").edit(mllm, [])
    with pytest.raises(ValueError, match=r"target of edit request 'x'.*is empty"):
        editor("ft").edit(mllm, [REQUEST, EditRequest("w5", "", SEEN.image, id="x")])
    patches = Region(("vision",), ("embed",))
    with pytest.raises(SiteError, match=r"a lora edit changes matrices, and .*patch_embedding"):
        editor("lora", options("lora", region=patches)).edit(mllm, [REQUEST])


def test_editors_are_found_by_name():
    assert {"ft", "ft-l", "lora"} <= set(editors())
    with pytest.raises(ValueError, match=r"no editor 'lorra'; there are .*ft.*lora"):
        editor("lorra")
