"""The shipped questions are the package's, splits share nothing, and the reader yields them."""

import hashlib
import json

import pyarrow.parquet as pq
import pytest

from mmtune import zoo
from mmtune.data import readers
from mmtune.data.images import load_image
from mmtune.data.options import SourceOptions
from mmtune.data.records import ImageBytes, Question, Record
from mmtune.zoo.tiny_blip.questions import KINDS, caption_of

SPLITS = ("train", "val", "test")
SHAPES = {"circle", "rectangle", "triangle"}
COLORS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}


@pytest.fixture(scope="module")
def rows():
    return {s: pq.read_table(zoo.data_path("easy-vqa", s)).to_pylist() for s in SPLITS}


def test_counts_are_those_of_the_package_the_summary_and_the_card(rows):
    counts = {
        split: {
            kind: sum(q["kind"] == kind for r in some for q in r["questions"]) for kind in KINDS
        }
        for split, some in rows.items()
    }
    asked = {split: sum(found.values()) for split, found in counts.items()}
    assert asked["train"] + asked["val"] == 38575
    assert asked["test"] == 9673
    assert {split: len(some) for split, some in rows.items()} == {
        "train": 3600,
        "val": 400,
        "test": 1000,
    }
    summary = json.loads((zoo.DATA_ROOT / "easy-vqa.json").read_text())
    card = (zoo.DATA_ROOT / "README.md").read_text()
    for kind in KINDS:
        cells = " | ".join(f"{counts[split][kind]:,}" for split in SPLITS)
        assert f"| `{kind}` | {cells} |" in card
        assert all(summary[split]["kinds"][kind] == counts[split][kind] for split in SPLITS)
    assert f"| all questions | {' | '.join(f'{asked[s]:,}' for s in SPLITS)} |" in card
    assert {split: summary[split]["questions"] for split in SPLITS} == asked


def test_splits_share_no_picture_and_no_id(rows):
    seen = {}
    for split, some in rows.items():
        for row in some:
            image = load_image(ImageBytes(row["image"]["bytes"]))
            assert image.size == (64, 64)
            assert seen.setdefault(hashlib.sha256(image.tobytes()).digest(), row["id"]) == row["id"]
        assert all(row["id"].startswith("test-") == (split == "test") for row in some)
    assert len(seen) == 5000
    ids = [q["id"] for some in rows.values() for row in some for q in row["questions"]]
    assert len(set(ids)) == len(ids)


def test_shape_and_colour_answer_every_question(rows):
    for row in (row for some in rows.values() for row in some):
        shape, color = row["shape"], row["color"]
        for item in row["questions"]:
            words = set(item["question"].rstrip("?").split())
            named = words & (SHAPES if item["kind"].endswith("shape") else COLORS)
            if item["kind"] in ("shape", "color"):
                assert item["answer"] == row[item["kind"]]
                assert item["answer"] not in words
                continue
            negated = bool(words & {"no", "not"})
            assert negated == item["kind"].startswith("lacks")
            there = named <= {shape, color}
            assert item["answer"] == ("yes" if there != negated else "no")


def test_captions_say_what_is_known():
    assert caption_of({"shape": "circle", "color": "teal"}) == "teal circle"
    assert caption_of({"shape": "circle", "color": None}) is None


def test_the_licence_ships_with_the_data():
    text = (zoo.DATA_ROOT / "easy-vqa-LICENSE.txt").read_text()
    assert text.startswith("MIT License")
    assert "Copyright (c) 2019 Victor Zhou" in text


def questions(**options):
    return list(readers.read(SourceOptions("zoo", **options), "val"))


def test_reader_yields_the_questions_in_order(rows):
    found = questions(name="easy-vqa")
    expected = [(row, item) for row in rows["val"] for item in row["questions"]]
    assert len(found) == len(expected) == 3832
    for question, (row, item) in zip(found, expected, strict=True):
        assert isinstance(question, Question)
        assert question.image == ImageBytes(row["image"]["bytes"])
        assert (question.question, question.answers) == (item["question"], (item["answer"],))
        assert question.id == item["id"]
        assert question.fields == {
            "kind": item["kind"],
            "shape": row["shape"],
            "color": row["color"],
            "image_id": row["id"],
        }
    path = zoo.data_path("easy-vqa", "val")
    last = expected[-1][1]["id"]
    assert found[-1].where == f"{path}, row 399, question {last}"


def test_reader_takes_splits_limits_and_other_data_sets_beside():
    assert [q.id for q in questions(name="easy-vqa", split="test", limit=2)] == [
        "test-0-0",
        "test-0-1",
    ]
    both = questions(name="{clipart-food,easy-vqa}")
    assert [type(found) for found in both] == [Record] * 25 + [Question] * 3832
