"""What the tab Edit does: answers before, under and after an edit, and the model's bits."""

from __future__ import annotations

import pytest
import torch

from editing.edits import applied_to
from editing.methods.base import editors
from editing.regions import parameters_of
from editing.requests import Probe
from mmtune.data.images import load_image
from mmtune.ui.editing import (
    ASKED,
    ELSEWHERE,
    REPHRASED,
    Desk,
    Questions,
    drawings,
    editors_at_hand,
    in_region,
    region_is_open,
)
from mmtune.ui.problems import PageProblem
from tests.editing.tiny import bits, picture, same_bits, tiny

QUESTIONS = Questions("w5 w9 w7", picture(0), "w6 w9", picture(1))
TARGET = "w40 w41"


@pytest.fixture(scope="module")
def desk():
    return Desk(tiny("llava"))


@pytest.mark.parametrize("name", ["ft", "ft-l", "grace", "ike", "liveedit", "lora", "wise"])
def test_every_editor_at_hand_edits_and_undo_gives_the_same_answers_and_bits(desk, name):
    before, said = bits(desk.mllm.model), desk.ask(QUESTIONS)
    held = desk.edit(QUESTIONS, TARGET, name)
    assert same_bits(desk.mllm.model, before)
    assert applied_to(desk.mllm) == ()
    assert held.before == said
    with held.edit.applied(desk.mllm):
        probes = list(QUESTIONS.probes().values())
        assert list(held.after.values()) == desk.mllm.answer(probes)
    found = desk.undo(held)
    assert found.answers == said
    assert found.same_answers
    assert found.same_bits
    assert same_bits(desk.mllm.model, before)


def test_an_edit_that_takes_is_told_from_one_that_does_not(desk):
    assert desk.edit(QUESTIONS, TARGET, "liveedit").took
    assert desk.edit(QUESTIONS, TARGET, "liveedit").after[ASKED] == TARGET
    assert not desk.edit(QUESTIONS, TARGET, "ft-l").took


def test_undo_notices_what_is_not_as_before():
    desk = Desk(tiny("llava"))
    held = desk.edit(QUESTIONS, TARGET, "lora")
    parameter = next(desk.mllm.model.parameters())
    with torch.no_grad():
        parameter.flatten()[0] += 1e-3
    assert not desk.undo(held).same_bits


def test_undo_notices_other_answers(desk):
    from dataclasses import replace

    held = desk.edit(QUESTIONS, TARGET, "lora")
    assert not desk.undo(replace(held, before={**held.before, ASKED: "w3"})).same_answers


def test_all_numbers_are_counted_once(desk):
    model = desk.mllm.model
    tensors = [*model.parameters(), *model.buffers()]
    held = desk.edit(QUESTIONS, TARGET, "lora")
    assert desk.undo(held).count == sum(tensor.numel() for tensor in tensors)


def test_visitors_do_not_see_each_others_edits(desk):
    one = desk.edit(QUESTIONS, TARGET, "liveedit")
    two = desk.edit(QUESTIONS, "w44", "liveedit")
    assert one.before == two.before
    assert desk.ask(QUESTIONS, one.edit)[ASKED] == TARGET
    assert desk.ask(QUESTIONS, two.edit)[ASKED] == "w44"
    assert desk.ask(QUESTIONS) == one.before


def test_what_is_asked():
    image, other = picture(0), picture(1)
    probes = Questions(" w5 w9 ", image, " w6 ", other).probes()
    assert probes == {
        ASKED: Probe("w5 w9", "", image),
        REPHRASED: Probe("w6", "", image),
        ELSEWHERE: Probe("w5 w9", "", other),
    }
    assert list(Questions("w5", image).probes()) == [ASKED]


@pytest.mark.parametrize(
    ("questions", "target", "message"),
    [
        (Questions("w5", None), TARGET, "Choose a picture"),
        (Questions(" ", picture(0)), TARGET, "Type a question"),
        (QUESTIONS, " \n", "Type the new answer"),
    ],
)
def test_what_is_missing_is_told(desk, questions, target, message):
    with pytest.raises(PageProblem, match=message):
        desk.edit(questions, target, "ft")


def test_the_answer_that_is_given_already_is_no_edit(desk):
    said = desk.ask(QUESTIONS)[ASKED]
    for target in (said, f" {said.upper()}. "):
        with pytest.raises(PageProblem, match=f"answers “{said}” already"):
            desk.edit(QUESTIONS, target, "ft")


def test_trained_editors_are_those_that_the_zoo_has_for_the_model():
    untrained = {"ft", "ft-l", "lora", "grace", "ike", "liveedit", "wise"}
    assert set(editors_at_hand("zoo:tiny-llava")) == untrained | {"ke", "mend", "serac"}
    assert set(editors_at_hand("zoo:tiny-clip")) == untrained
    assert set(editors_at_hand("hf:mend")) == untrained
    assert set(editors()) - untrained == {"alphaedit", "ke", "memit", "mend", "rome", "serac"}


def test_a_region_aims_editors_that_have_none_of_their_own(desk):
    at_hand = editors_at_hand("zoo:tiny-llava")
    assert in_region(at_hand["ft"], "vision").settings.region == "vision"
    assert in_region(at_hand["ft"], None) is at_hand["ft"]
    for name in ("mend", "serac", "ike"):
        assert not region_is_open(at_hand[name])
        assert in_region(at_hand[name], "vision") is at_hand[name]
    held = desk.edit(QUESTIONS, TARGET, "ft", "vision")
    assert set(held.edit.changes) == set(parameters_of(desk.mllm.backbone, "vision"))


def test_the_drawings_decode():
    assert len({image.data for image in drawings()}) == 8
    assert all(load_image(image).mode == "RGB" for image in drawings())
