"""GRACE in a model: keys of prompts, values that are fitted, images as keys."""

from __future__ import annotations

import pytest
import torch

from editing.methods.grace import GraceOptions, Place
from editing.requests import EditRequest
from mmtune.backbones.base import SiteError
from tests.editing.memories import fact, memory_editor, request, taught
from tests.editing.tiny import BARE, PROBES, REQUEST, SEEN, tiny


@torch.no_grad()
def test_a_key_is_the_layers_input_where_the_answer_begins():
    mllm, found = tiny("llava"), []
    edit = taught("grace")
    module = mllm.model.get_submodule(edit.path)
    handle = module.register_forward_hook(lambda m, args, y: found.append((args[0], y)))
    batch = mllm.batch([fact()])
    mllm.answer_logits(batch)
    handle.remove()
    (x, y), count = found[0], batch.target_ids.shape[1]
    torch.testing.assert_close(edit.book.keys[0], x[0, -count], rtol=1e-4, atol=1e-6)
    start = memory_editor("grace", steps=1, lr=1e-9).edit(mllm, [fact()])
    torch.testing.assert_close(start.book.values[0], y[0, -count], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_cold_values_are_drawn_from_the_generator():
    mllm, cold = tiny("llava"), memory_editor("grace", start="cold", steps=1, lr=1e-9)
    values = [
        cold.edit(mllm, [fact()], torch.Generator().manual_seed(seed)).book.values
        for seed in (1, 1, 2)
    ]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    assert 0 <= float(values[0].min()) < 0.2 < 0.8 < float(values[0].max()) <= 1


def test_values_do_not_depend_on_what_is_fitted_with_them():
    mllm, grace = tiny("llava"), memory_editor("grace", steps=5)
    facts = [fact(), request(26), request(44, image=False)]
    together = grace.edit(mllm, facts).book
    alone = [grace.edit(mllm, [one]).book for one in facts]
    torch.testing.assert_close(
        together.values, torch.cat([b.values for b in alone]), rtol=1e-3, atol=1e-4
    )
    assert together.labels == ("w23", "w26", "w44")


@torch.no_grad()
def test_of_one_question_the_latest_target_holds():
    mllm, grace = tiny("llava"), memory_editor("grace")
    first = fact()
    changed = EditRequest(first.question, "w26", first.image, id="new")
    edit = grace.extend(mllm, taught("grace"), [changed])
    assert edit.book.labels == ("w26",)
    with edit.applied(mllm):
        assert mllm.answer([first]) == ["w26"]
    both = grace.edit(mllm, [first, changed])
    assert both.book.labels == ("w26",)
    assert both.about["said"]


@pytest.mark.parametrize("name", ["blip2-opt", "llava"])
@torch.no_grad()
def test_a_vision_edit_is_found_by_its_image_alone(name):
    mllm, asked = tiny(name), {"blip2-opt": request(41), "llava": request(47)}[name]
    base = mllm.answer_logits(mllm.batch(PROBES))
    edit = memory_editor("grace", region="vision").edit(mllm, [asked])
    with edit.applied(mllm):
        assert mllm.answer([asked]) == [asked.target]
        assert torch.equal(mllm.answer_logits(mllm.batch(PROBES)), base)
        other = EditRequest(SEEN.question, "w5", asked.image)
        changed = mllm.answer_logits(mllm.batch([other]))
    assert not torch.equal(changed, mllm.answer_logits(mllm.batch([other])))
    with pytest.raises(ValueError, match="every request must have"):
        memory_editor("grace", region="vision").edit(
            mllm, [REQUEST, EditRequest(BARE.question, "w5")]
        )


@pytest.mark.parametrize(
    ("region", "replacement", "want"),
    [
        ("language", "last", "..x.."),
        ("language", "prompt", "xxx.."),
        ("language", "onward", "..xxx"),
        ("language", "all", "xxxxx"),
        ("vision", "last", "....x"),
        ("vision", "prompt", "xxxxx"),
        ("vision", "all", "xxxxx"),
    ],
)
def test_whose_states_are_replaced(region, replacement, want):
    at = Place("", region, replacement).replaced(5, 3, torch.device("cpu"))
    assert "".join(".x"[int(here)] for here in at) == want


def test_written_tokens_behind_a_prompt():
    def replaced(replacement):
        return Place("", "language", replacement).replaced(1, 0, torch.device("cpu")).tolist()

    assert [replaced(r) for r in ("last", "prompt", "onward", "all")] == [
        [False],
        [False],
        [True],
        [True],
    ]


def test_defaults_are_the_released_ones():
    options = GraceOptions()
    assert (options.radius, options.lr, options.steps) == (1.0, 1.0, 100)


@pytest.mark.parametrize("name", ["blip2-opt", "llava"])
@torch.no_grad()
def test_a_vision_edit_of_several_questions_about_one_image(name):
    """The projector sees the image once."""
    mllm, asked = tiny(name), {"blip2-opt": request(41), "llava": request(47)}[name]
    again = EditRequest("w11 w12", asked.target, asked.image)
    grace = memory_editor("grace", region="vision", steps=3)
    edit = grace.edit(mllm, [again, request(30), asked])
    assert edit.book.labels == (asked.target, "w30")
    assert torch.equal(edit.book.keys[0], grace.edit(mllm, [asked]).book.keys[0])
    probes = [asked, SEEN, again, request(30), BARE]
    with edit.applied(mllm):
        together = mllm.answer_logits(mllm.batch(probes))
        for row, probe in enumerate(probes):
            alone = mllm.answer_logits(mllm.batch([probe]))[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-4, atol=1e-4)
    base = mllm.answer_logits(mllm.batch(probes))
    changed = [not torch.equal(a, b) for a, b in zip(together, base, strict=True)]
    assert changed == [True, False, True, True, False]


def test_images_in_pieces_are_no_keys():
    with pytest.raises(SiteError, match=r"reads images in pieces.*use region: language"):
        memory_editor("grace", region="vision").edit(tiny("llava-onevision"), [fact()])
