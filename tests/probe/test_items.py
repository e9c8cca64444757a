import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtune.data.records import DataError
from mmtune.probe.items import Item, Region, item_of, read_items, write_items
from tests.probe.sets import item

TEXT = st.text(min_size=1).filter(str.strip)
BOX = st.tuples(*[st.floats(0, 0.4)] * 2, *[st.floats(0.5, 1)] * 2)
ITEMS = st.builds(
    Item,
    id=TEXT,
    images=st.lists(st.text(min_size=1), max_size=2).map(tuple),
    question=TEXT,
    answer=TEXT,
    category=TEXT,
    subcategory=st.text(),
    pair_id=st.text(),
    answers=st.lists(st.text(), max_size=2).map(tuple),
    fields=st.dictionaries(st.sampled_from("xyz"), st.integers()),
)


@given(ITEMS, st.lists(BOX, max_size=2))
def test_an_item_reads_back(one, boxes):
    one = Item(**{**vars(one), "regions": tuple(Region(b) for b in boxes) if one.images else ()})
    assert item_of(json.loads(json.dumps(one.as_json())), "here") == one


def test_a_set_reads_back_with_its_note(tmp_path):
    items = [item("a"), item("b", "red", choices=("red", "blue"))]
    write_items(tmp_path / "mine.jsonl", items)
    (tmp_path / "note.txt").write_text("made up\n")
    found = read_items(tmp_path / "mine.jsonl")
    assert (found.name, found.items, found.note) == ("mine", tuple(items), "made up")
    assert found.picture(items[0]).name == "a.png"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": " "}, "no answer"),
        ({"question": None}, "no question"),
        ({"choices": "red"}, "choices is no list of texts"),
        ({"choices": ["red", "blue"]}, "answer among no choices"),
        ({"regions": [{"box": [0.5, 0, 0.4, 1]}]}, "bad region"),
        ({"regions": [{"box": [0, 0, 1, 2]}]}, "bad region"),
        ({"regions": [{"box": [0, 0, 1, 1], "image": 1}]}, "region of no image"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(change, reason, tmp_path):
    good = item("good").as_json()
    lines = [good, {**item("bad").as_json(), **change}, good]
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{\n")
    with pytest.raises(DataError) as error:
        read_items(file)
    assert [p.reason for p in error.value.problems] == [reason, "id twice", "no JSON"]
    assert error.value.problems[0].where.endswith(":2")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no item"):
        read_items(tmp_path / "x.jsonl")


def test_kinds():
    assert item("a", "red", choices=("red",)).kind == "choice"
    assert item("a", "No").kind == "yes-no"
    assert item("a", "EXIT", fields={"exact_text": True}).kind == "text"
    assert item("a", "a dog").kind == "words"
