"""What is scored of a record, before and after an edit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from editing.changes import Delta
from editing.datasets import StandIn
from editing.edits import ContextEdit, MemoryEdit
from editing.evaluation.outcomes import (
    KINDS,
    LOCALITY,
    UNCHANGED,
    asked_of,
    base_outcomes,
    definitions_for,
    edited_outcomes,
    image_key,
    kind_scores,
    media_key,
)
from editing.metrics.aggregate import Score
from editing.metrics.definitions import (
    AGREEMENT,
    DIVERGENCE,
    GENERATED,
    MMEDIT_ACCURACY,
    MMEDIT_IMAGE_LOCALITY,
    MMEDIT_TEXT_LOCALITY,
    NLL,
    TOKEN_ACCURACY,
)
from editing.requests import EditRecord, EditRequest, Probe
from editing.weight_edits import WeightEdit
from mmtune.data.records import ImageFile
from tests.editing.tiny import MODELS, bits, drawn, paths, picture, same_bits, tiny


def record(number=0, target="w40 w41", **changes):
    image = picture(number)
    request = EditRequest(f"w5 w9 w{number + 10}", target, image, id=str(number))
    probes = {
        "text_generality": (Probe(f"w6 w9 w{number + 10}", target, image),),
        "image_generality": (Probe(request.question, target, picture(number + 50)),),
        "text_locality": (Probe(f"w11 w{number + 3}", "w23 w24"),),
        "image_locality": (Probe("w7", "w25 w26", picture(number + 90)),),
        "portability": (Probe("w8", "w27", image), Probe("w9 w8", "w28 w29", image)),
    }
    return EditRecord(request, id=str(number), **(probes | changes))


class Wrong(MemoryEdit):
    """Answers beside the model."""

    kind = "test-wrong"

    def logits(self, batch, inner):
        return inner(batch) + torch.linspace(0, 30, inner(batch).shape[-1])

    def written(self, batch, decoding, inner):
        return ["w3"] * len(batch)

    def settings(self):
        return {}

    @classmethod
    def restored(cls, settings, tensors, about):
        return cls(about)


def shift(mllm, size):
    path = paths(mllm)[-1]
    weight = mllm.model.get_parameter(path)
    return WeightEdit.of(mllm, {path: Delta(size * drawn(weight.shape, 0))})


def test_a_record_asks_its_request_first_and_answers_are_stripped():
    one = record(target=" w40 w41 ")
    asked = asked_of(one)
    assert [a.kind for a in asked] == [*KINDS, "portability"]
    assert {a.probe.answer for a in asked[:3]} == {"w40 w41"}
    bare = EditRecord(EditRequest("w5", "w6"), id="9")
    assert [a.kind for a in asked_of(bare)] == ["reliability"]


def test_records_of_one_image_are_of_one_cluster():
    here = ImageFile("root", "a/b.png")
    one = EditRecord(EditRequest("q", "t", here), id="0")
    other = replace(one, request=EditRequest("r", "u", StandIn("any", "x.png", "a/b.png")), id="1")
    assert image_key(one) == image_key(other) == "a/b.png"
    assert image_key(EditRecord(EditRequest("q", "t"), id="2")) == "record 2"
    assert media_key(picture(1)) == media_key(picture(1)) != media_key(picture(2))


@pytest.mark.parametrize("name", MODELS)
def test_an_edit_that_changes_nothing_gives_the_numbers_of_the_unedited_model(name):
    mllm = tiny(name)
    records = [record(0), record(1)]
    compat = ("mmedit",)
    before = base_outcomes(mllm, records, compat)
    for edit in (None, shift(mllm, 0.0), ContextEdit("")):
        assert edited_outcomes(mllm, records, edit, before, compat) == before
    for kind in LOCALITY:
        for definition in definitions_for(kind, compat):
            score = kind_scores(before[0], kind, definition)
            wanted = 0 if definition is DIVERGENCE else score.n
            assert score.total == wanted, definition.name


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_the_edited_model_asked_directly(name):
    mllm = tiny(name)
    one, before_bits = record(), bits(mllm.model)
    edit = shift(mllm, 1.0)
    before = base_outcomes(mllm, [one])
    (found,) = edited_outcomes(mllm, [one], edit, before)
    assert same_bits(mllm.model, before_bits)
    probes = [a.probe for a in asked_of(one)]
    with edit.applied(mllm):
        written = mllm.answer(probes)
        batch = mllm.batch(probes)
        logits = mllm.answer_logits(batch)
    lines = [line for kind in found for line in found[kind]]
    assert [line["after"] for line in lines] == written
    assert [line["before"] for line in lines] == mllm.answer(probes)
    logs = logits.double().log_softmax(-1)
    for row, line in enumerate(lines):
        places = batch.answer_mask[row].bool()
        ids = batch.target_ids[row][places]
        total, n = line["scores"][NLL.name]
        own = logs[row][places].gather(-1, ids[:, None])
        assert n == len(ids)
        assert total == pytest.approx(-float(own.sum()), rel=1e-5)
        hits = int((logits[row][places].argmax(-1) == ids).sum())
        assert line["scores"][TOKEN_ACCURACY.name] == [hits, n]


def test_locality_compares_with_the_unedited_model_at_the_answers_tokens(mllm):
    one = record()
    edit = shift(mllm, 10.0)
    (found,) = edited_outcomes(mllm, [one], edit, base_outcomes(mllm, [one]))
    for kind in LOCALITY:
        (probe,) = getattr(one, kind)
        batch = mllm.batch([probe])
        places = batch.answer_mask[0].bool()
        p = mllm.answer_logits(batch)[0][places].double()
        with edit.applied(mllm):
            q = mllm.answer_logits(batch)[0][places].double()
        agree = (p.argmax(-1) == q.argmax(-1)).sum()
        kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum()
        assert kind_scores(found, kind, AGREEMENT) == Score(float(agree), int(places.sum()))
        got = kind_scores(found, kind, DIVERGENCE)
        assert got.total == pytest.approx(float(kl), rel=1e-4)
        assert got.total > 1e-3


def test_several_probes_of_a_kind_are_one_score(mllm):
    (found,) = base_outcomes(mllm, [record()])
    assert kind_scores(found, "portability", GENERATED).n == 2
    own = [p["scores"][TOKEN_ACCURACY.name] for p in found["portability"]]
    total, n = map(sum, zip(*own, strict=True))
    assert kind_scores(found, "portability", TOKEN_ACCURACY) == Score(total, n)
    assert kind_scores({}, "portability", GENERATED) is None


def test_published_definitions_are_added_when_asked_for_and_missing_for_memories(mllm):
    one = record()
    plain, asked = base_outcomes(mllm, [one]), base_outcomes(mllm, [one], ["mmedit"])
    assert kind_scores(plain[0], "reliability", MMEDIT_ACCURACY) is None
    (found,) = edited_outcomes(mllm, [one], shift(mllm, 1.0), asked, ["mmedit"])
    assert kind_scores(found, "reliability", MMEDIT_ACCURACY) == kind_scores(
        found, "reliability", TOKEN_ACCURACY
    )
    image = kind_scores(found, "image_locality", MMEDIT_IMAGE_LOCALITY)
    (probe,) = one.image_locality
    assert image.n == 10 * mllm.sequences(mllm.batch([probe])).logits.shape[1]
    assert 0 < image.value < 1
    (beside,) = edited_outcomes(mllm, [one], Wrong(), asked, ["mmedit"])
    assert kind_scores(beside, "text_locality", MMEDIT_TEXT_LOCALITY) is None
    assert kind_scores(beside, "text_locality", AGREEMENT).value < 1
    assert kind_scores(beside, "text_locality", UNCHANGED).value == 0
    assert beside["reliability"][0]["after"] == "w3"


def test_a_written_answer_is_unchanged_apart_from_case_and_punctuation(mllm):
    one = record()
    (before,) = base_outcomes(mllm, [one])
    line = before["image_locality"][0]
    for told, same in ((line["after"].upper() + ".", 1), ("w3 " + line["after"], 0)):
        earlier = {**before, "image_locality": [{**line, "after": told}]}
        (found,) = edited_outcomes(mllm, [one], None, [earlier])
        assert kind_scores(found, "image_locality", UNCHANGED) == Score(same, 1)


def test_scores_that_are_no_numbers_are_an_error(mllm):
    class Broken(Wrong):
        kind = "test-broken"

        def logits(self, batch, inner):
            return inner(batch) * float("nan")

    one = record()
    with pytest.raises(ValueError, match="NaN"):
        edited_outcomes(mllm, [one], Broken(), base_outcomes(mllm, [one]))
    assert mllm.around == []
