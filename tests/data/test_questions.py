"""Readers of questions, weights of answers, and questions without any."""

from __future__ import annotations

import json
import logging

import pytest
from PIL import Image

from mmtune.data import DataError, DataOptions, SourceOptions
from mmtune.data.checking import load_data
from mmtune.data.questions import weighted
from mmtune.data.readers import read
from mmtune.data.records import Problem, Question

TEN = [{"answer": a, "answer_id": i} for i, a in enumerate(["yes "] * 7 + ["no"] * 3, 1)]


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)


def vqav2(folder, questions=None, annotations=None, subset="val2014"):
    questions = questions or [{"question_id": 42000, "image_id": 42, "question": " Is it red? "}]
    annotations = annotations or [
        {
            "question_id": 42000,
            "image_id": 42,
            "answers": TEN,
            "answer_type": "yes/no",
            "question_type": "is it",
        }
    ]
    asked, told = folder / "v2_OpenEnded_mscoco_val2014_questions.json", folder / "answers.json"
    asked.write_text(json.dumps({"data_subtype": subset, "questions": questions}))
    told.write_text(json.dumps({"annotations": annotations}))
    return SourceOptions("vqav2", str(asked), images=str(folder / "coco"), answers=str(told))


def test_vqav2_joins_questions_with_their_ten_answers(tmp_path):
    source = vqav2(tmp_path)
    picture(tmp_path / "coco" / "val2014" / "COCO_val2014_000000000042.jpg")
    (found,) = load_data(DataOptions(val=source), progress=False, kind=Question)["val"].records
    assert (found.question, found.id) == ("Is it red?", "42000")
    assert found.answers == ("yes",) * 7 + ("no",) * 3
    assert found.fields == {"image_id": 42, "answer_type": "yes/no", "question_type": "is it"}
    assert found.image.read()


def test_vqav2_images_may_lie_in_the_folder_itself_and_dev_tests_use_the_test_images(tmp_path):
    (tmp_path / "coco").mkdir()
    source = vqav2(tmp_path, subset="test-dev2015")
    (found,) = read(source, "test")
    assert found.image.name == "COCO_test2015_000000000042.jpg"
    hidden = SourceOptions("vqav2", str(source.path), images=source.images)
    (found,) = read(hidden, "test")
    assert found.answers == ()
    with pytest.raises(DataError, match="set `answers` to the annotations file"):
        list(read(hidden, "val"))


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        ({"question": ""}, "malformed record", "question is ''"),
        ({"image_id": "x"}, "malformed record", "image_id is 'x'"),
        ({"question_id": None}, "malformed record", "question_id is None"),
        ({"question_id": 7}, "question without answers", "nothing for question_id 7"),
    ],
)
def test_vqav2_names_file_record_and_field(tmp_path, change, reason, words):
    good = {"question_id": 42000, "image_id": 42, "question": "Is it red?"}
    source = vqav2(tmp_path, [good, good | change])
    _, problem = read(source, "val")
    assert isinstance(problem, Problem)
    assert problem.where == f"{source.path}, record 1"
    assert problem.reason == reason
    assert words in problem.text


def test_vqav2_annotation_without_an_answer(tmp_path):
    empty = {"question_id": 42000, "answers": [{"answer": " "}]}
    (problem,) = read(vqav2(tmp_path, annotations=[empty]), "train")
    assert problem.reason == "question without answers"
    assert problem.where.endswith("answers.json, question_id 42000")


def blip(folder, entries):
    path = folder / "vqa.json"
    path.write_text(json.dumps(entries))
    return SourceOptions("blip_vqa", str(path))


def test_blip_reads_lists_single_answers_and_hidden_ones(tmp_path):
    entry = {"question_id": 5, "question": "What?", "image": "a.png", "dataset": "vqa"}
    entries = [
        entry | {"answer": ["cat", "cat", "dog"]},
        {"question": "Why?", "image": "a.png", "answer": "so", "dataset": "vg"},
    ]
    one, two = read(blip(tmp_path, entries), "train")
    assert (one.answers, one.id) == (("cat", "cat", "dog"), "5")
    assert (two.answers, two.id, two.fields["dataset"]) == (("so",), "1", "vg")
    (hidden,) = read(blip(tmp_path, [entry]), "test")
    assert hidden.answers == ()
    (problem,) = read(blip(tmp_path, [entry]), "train")
    assert (problem.reason, problem.text) == (
        "question without answers",
        "it has no field 'answer'",
    )
    (problem,) = read(blip(tmp_path, [entry | {"answer": 3}]), "test")
    assert (problem.reason, problem.text[:12]) == ("malformed record", "answer is '3")


def test_weights_are_the_shares_of_annotators():
    assert weighted(["a", "b", "a", "a"]) == {"a": 0.75, "b": 0.25}
    assert weighted(["a"], 0.2) == {"a": 0.2}


def test_training_questions_without_answers_stop_or_are_counted(tmp_path, caplog):
    picture(tmp_path / "a.png")
    path = tmp_path / "qa.jsonl"
    lines = [
        {"video_id": "a", "question": "Where?", "answer": ""},
        {"video_id": "a", "question": "Who?", "answer": "he"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    picture(tmp_path / "a" / "1.png")
    source = SourceOptions("video_qa", str(path))

    def loaded(on_error):
        options = DataOptions(train=source, test=source, on_error=on_error)
        return load_data(options, progress=False, kind=Question, videos=True)

    with pytest.raises(DataError, match="1 question without answers") as error:
        loaded("raise")
    assert error.value.problems[0].where == f"{path}, line 1"
    with caplog.at_level(logging.WARNING):
        found = loaded("skip")
    assert "train: left out 1 of 2 records (1 question without answers)" in caplog.text
    assert [q.question for q in found["train"].records] == ["Who?"]
    assert found["train"].skipped == {"question without answers": 1}
    assert [q.answers for q in found["test"].records] == [(), ("he",)]  # hidden
