"""The sources that ship: drawings and general knowledge."""

from __future__ import annotations

import itertools

from data_builders.general_facts import facts
from data_builders.pictures import MADE, Pictures
from data_builders.sources.clipart import SPLITS, Clipart, ClipartOptions, captions_of
from data_builders.sources.facts import Facts, FactsOptions
from mmtune.zoo.tiny_llava.questions import WORDINGS, drawings


def read(folder, count=None, **options):
    source = Clipart(ClipartOptions(**options))
    pictures = Pictures({MADE: folder})
    return list(itertools.islice(source.read(pictures), count)), pictures


def test_drawings_are_asked_about_in_two_wordings_and_their_pictures_written(tmp_path):
    rows = {r["id"]: r for name, part in SPLITS["test"] for r in drawings(name, part)}
    found, pictures = read(tmp_path)
    assert len({s.id for s in found}) == len(found) == 2 * len(rows)
    for sample in found:
        path, _, kind = sample.id.rpartition("#")
        row = rows[f"{path}.svg"]
        thing = row["thing"]
        assert sample.fields["kind"] == kind
        assert sample.answers == ({"name": thing.noun, "kind": thing.kind}[kind],)
        assert {sample.question, sample.fields["rephrase"]} <= set(WORDINGS[kind])
        assert sample.question != sample.fields["rephrase"]
        assert sample.concept == thing.noun
    for sample in found[:20]:
        row = rows[f"{sample.id.rpartition('#')[0]}.svg"]
        assert pictures.file(sample.image).read() == row["image"]["bytes"]
    # A picture has a file of its own, which its two questions share.
    assert len({s.image for s in found}) == len(rows)


def test_the_seed_decides_order_and_wordings_and_a_limit_nothing_else(tmp_path):
    few, _ = read(tmp_path / "a", 30)
    more, _ = read(tmp_path / "b", 60)
    other, _ = read(tmp_path / "c", 30, seed=1)
    assert more[:30] == few
    assert [s.id for s in other] != [s.id for s in few]
    assert len(list((tmp_path / "a").rglob("*.*"))) == len({s.image for s in few})


def test_train_and_test_have_no_drawing_in_common(tmp_path):
    test, _ = read(tmp_path / "a", kinds=["name"])
    train, _ = read(tmp_path / "b", split="train", kinds=["name"])
    assert not {s.id for s in test} & {s.id for s in train}


def test_what_is_said_of_a_drawing_is_a_sentence():
    row = next(r for r in drawings("clipart", "train") if r["title"] == "note book icon")
    assert captions_of(row) == ("a drawing of a note book icon", "a drawing of a book")
    alone = row | {"title": "book"}
    assert captions_of(alone) == ("a drawing of a book",)
    # A title that does not name the thing says nothing.
    assert captions_of(row | {"title": "kallisti 1"}) == ("a drawing of a book",)


def test_facts_of_the_splits_are_apart():
    parts = {s: list(Facts(FactsOptions(s)).read(Pictures({}))) for s in ("all", "test", "train")}
    questions = {name: {s.question for s in own} for name, own in parts.items()}
    assert questions["all"] == set(facts()) == questions["test"] | questions["train"]
    assert not questions["test"] & questions["train"]
    assert abs(len(questions["test"]) - len(questions["train"])) <= 1
    assert all(s.answers == (facts()[s.question],) for s in parts["all"])
    assert {s.id for s in parts["test"]} < {s.id for s in parts["all"]}
