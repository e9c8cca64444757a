from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from editing.datasets import (
    FIELDS,
    STAND_INS,
    StandIn,
    load_records,
    read_records,
    stand_in_note,
    write_records,
)
from editing.requests import EditRecord, Probe
from mmtune.data.records import DataError, ImageBytes, ImageFile, Problem
from tests.data.pictures import encoded, write_pictures
from tests.editing.edit_items import DATA, hop, images_of, item, write

FILES = [
    "mmedit/vqa_eval.json",
    "mmedit/vqa_train.json",
    "mmedit/caption_eval_edit.json",
    "mmedit/caption_train_edit.json",
    "vlkeb/eval.json",
    "vlkeb/eval_edit_onehop.json",
]
published = pytest.mark.skipif(not DATA.is_dir(), reason="the published files are not here")


def test_every_field_has_its_place_in_a_record(tmp_path):
    path = write(tmp_path / "data.json", [item(3, port_new=[hop(kind="maker")], source="shop")])
    (record,) = read_records(path, images="pictures")
    image = ImageFile("pictures", "shelves/3.png")
    assert record.request.question == "What is on shelf 3?"
    assert (record.request.target, record.request.image) == ("3 cups", image)
    assert record.prediction == "a jar"
    assert record.text_generality == (Probe("Which things stand on shelf 3?", "3 cups", image),)
    other = ImageFile("pictures", "other/3.png")
    assert record.image_generality == (Probe("What is on shelf 3?", "3 cups", other),)
    assert record.text_locality == (Probe("who built tower 3", "Ada"),)
    around = ImageFile("pictures", "around/3.png")
    assert record.image_locality == (Probe("What colour is the door?", "green", around),)
    rest = {"port_edit_q": "Who makes cups?", "port_edit_a": "a potter", "kind": "maker"}
    asked = "Who makes what is on the shelf?"
    assert record.portability == (Probe(asked, "a potter", image, rest),)
    assert (record.id, record.where) == ("0", f"{path}, record 0")
    assert record.fields == {"source": "shop"}


def test_a_file_is_written_as_it_was_read(tmp_path):
    items = [
        item(0),
        item(1, pred=None),
        item(2, pred="", alt=" two words \n", note={"deep": [1, None, {"x": True}]}),
        item(3, port_new=[hop(), hop(port_edit_a="someone", steps=2)]),
        item(4, alt="\ud800 alone", src="Was ist „das“?"),
    ]
    records = list(read_records(write(tmp_path / "in.json", items)))
    write_records(tmp_path / "new" / "out.json", records)
    text = (tmp_path / "new" / "out.json").read_text()
    assert json.loads(text) == items
    back = list(read_records(tmp_path / "new" / "out.json", images=tmp_path))
    assert [replace(r, where="") for r in back] == [replace(r, where="") for r in records]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out.json"]


@published
@pytest.mark.parametrize("name", FILES)
def test_published_files_are_read_and_written_back(name, tmp_path):
    items = json.loads((DATA / name).read_text())
    found = list(read_records(DATA / name))
    bad = [n for n, r in enumerate(found) if isinstance(r, Problem)]
    same = [n for n, i in enumerate(items) if i["pred"].lower() == i["alt"].lower()]
    assert bad == same
    assert {found[n].reason for n in bad} <= {"nothing to edit"}
    assert len(bad) == {FILES[0]: 4, FILES[1]: 6}.get(name, 0)
    write_records(tmp_path / "out.json", [r for r in found if isinstance(r, EditRecord)])
    left = [i for n, i in enumerate(items) if n not in bad]
    assert json.loads((tmp_path / "out.json").read_text()) == left


BAD = [
    (item(0, loc=None), "missing field", "loc: it is absent"),
    (item(0, m_loc_q=7), "malformed record", "m_loc_q: expected text, got 7"),
    (item(0, rephrase=" \n"), "empty field", "rephrase: it is ' \\n'"),
    (item(0, image=""), "empty field", "image: it is ''"),
    (item(0, alt="  "), "empty target", "alt: it is '  '"),
    (item(0, pred=["x"]), "malformed record", "pred: expected text, got ['x']"),
    (item(0, pred="0 CUPS. "), "nothing to edit", "the model says '0 CUPS. ' already"),
    (item(0, port_new=[]), "malformed record", "port_new: expected a list with questions"),
    (item(0, port_new=[hop(), 3]), "malformed record", "port_new[1]: expected a mapping, got 3"),
    (item(0, port_new=[hop(port_a="")]), "empty field", "port_new[0].port_a: it is ''"),
    ("text", "malformed record", "expected a mapping, got 'text'"),
    (None, "malformed record", "expected a mapping, got None"),
]


def test_bad_records_are_named_and_counted(tmp_path, caplog):
    items = [item(9), *(bad for bad, _, _ in BAD)]
    write_pictures(tmp_path, images_of(items[:1]))
    path = write(tmp_path / "data.json", items)
    with pytest.raises(DataError) as caught:
        load_records(path, progress=False)
    assert [(p.where, p.reason) for p in caught.value.problems] == [
        (f"{path}, record {n}", reason) for n, (_, reason, _) in enumerate(BAD, start=1)
    ]
    for problem, (_, _, text) in zip(caught.value.problems, BAD, strict=True):
        assert text in problem.text
    assert "mmtune audit FILE --fix OUT" in str(caught.value)
    with caplog.at_level(logging.WARNING):
        found = load_records(path, on_error="skip", progress=False)
    assert [r.id for r in found.records] == ["0"]
    assert sum(found.skipped.values()) == len(BAD)
    assert found.skipped["malformed record"] == 6
    assert "left out 12 of 13 records" in caplog.text
    assert found.files == [path]


def test_images_are_decoded_and_may_not_leave_their_folder(tmp_path):
    root = tmp_path / "images"
    items = [
        item(0),
        item(1),
        item(2, m_loc="../outside.png"),
        item(3, image=str(tmp_path / "outside.png")),
        item(4, image_rephrase="broken.png"),
    ]
    names = [n for n in images_of(items) if n.startswith(("shelves", "other", "around"))]
    write_pictures(root, [n for n in names if n != "other/1.png"])
    (tmp_path / "outside.png").write_bytes(encoded())
    (root / "broken.png").write_bytes(b"no picture")
    path = write(tmp_path / "data.json", items)
    with pytest.raises(DataError) as caught:
        load_records(path, images=root, progress=False)
    assert [(p.where, p.reason, p.text.partition(":")[0]) for p in caught.value.problems] == [
        (f"{path}, record 1", "missing image", "image_rephrase"),
        (f"{path}, record 2", "image outside root", "m_loc"),
        (f"{path}, record 3", "image outside root", "image"),
        (f"{path}, record 4", "not an image", "image_rephrase"),
    ]
    found = load_records(path, images=root, on_error="skip", progress=False)
    assert [r.id for r in found.records] == ["0"]
    with pytest.raises(DataError, match="all were left out"):
        load_records(path, images=tmp_path / "nowhere", on_error="skip", progress=False)


def test_stand_ins_are_the_same_everywhere_and_labelled(tmp_path):
    names = ["b/two.png", "a.jpg", "c.png"]
    write_pictures(tmp_path / "one", names)
    write_pictures(tmp_path / "again", reversed(names))
    (tmp_path / "one" / "notes.txt").write_text("no picture")
    items = [item(n) for n in range(40)]
    path = write(tmp_path / "data.json", items)
    found = load_records(path, stand_ins=tmp_path / "one", progress=False).records
    other = write(tmp_path / "shuffled.json", items[::-1])
    back = load_records(other, stand_ins=tmp_path / "again", progress=False).records[::-1]
    for record, same, source in zip(found, back, items, strict=True):
        ref = record.request.image
        assert isinstance(ref, StandIn)
        assert ref.stands_for == source["image"]
        assert record.fields[STAND_INS]["image"] == ref.name
        assert set(record.fields[STAND_INS]) == {"image", "image_rephrase", "m_loc"}
        assert record.fields == same.fields
    assert {r.request.image.name for r in found} == set(names)
    assert "40 of 40 records" in stand_in_note(found)
    own = list(read_records(path))
    assert stand_in_note(own) == ""
    assert stand_in_note([*own, *found[:1]]).startswith("STAND-IN IMAGES: 1 of 41 records")
    # What is written names the data set's own images again.
    write_records(tmp_path / "out.json", found)
    assert json.loads((tmp_path / "out.json").read_text()) == items


def test_a_stand_in_is_chosen_by_the_sha256_of_the_path(tmp_path):
    import hashlib

    write_pictures(tmp_path, ["0.png", "1.png", "2.png"])
    (record,) = read_records(write(tmp_path / "data.json", [item(5)]), stand_ins=tmp_path)
    digest = hashlib.sha256(b"shelves/5.png").hexdigest()
    assert record.request.image.name == f"{int(digest[:16], 16) % 3}.png"


def test_stand_ins_need_pictures_and_are_not_mixed_with_images(tmp_path):
    path = write(tmp_path / "data.json", [item()])
    with pytest.raises(DataError, match="no stand-in images"):
        list(read_records(path, stand_ins=tmp_path / "nowhere"))
    with pytest.raises(DataError, match="never mixed"):
        list(read_records(path, images=tmp_path, stand_ins=tmp_path))


@published
def test_published_text_runs_with_stand_ins(tmp_path):
    write_pictures(tmp_path, [f"{n}.png" for n in range(5)])
    path = DATA / "mmedit" / "vqa_eval.json"
    found = load_records(path, stand_ins=tmp_path, on_error="skip", progress=False)
    assert (len(found.records), found.skipped) == (2089, {"nothing to edit": 4})
    assert all(STAND_INS in record.fields for record in found.records)
    again = load_records(path, stand_ins=tmp_path, on_error="skip", limit=50, progress=False)
    assert again.records == found.records[:50]


def test_records_that_the_format_cannot_hold_are_named(tmp_path):
    (record,) = read_records(write(tmp_path / "data.json", [item()]))
    (probe,) = record.text_generality
    held = ImageBytes(encoded())
    cases = [
        (replace(record, text_generality=(probe, probe)), "text_generality has 2 probes"),
        (replace(record, image_locality=()), "image_locality has 0 probes"),
        (replace(record, request=replace(record.request, image=None)), "request has no image"),
        (replace(record, request=replace(record.request, image=held)), "an image in no file"),
        (replace(record, prediction="0 cups"), "nothing to edit"),
        (replace(record, request=replace(record.request, target=" ")), "empty target"),
        (
            replace(record, text_generality=(replace(probe, answer="else"),)),
            "no place for something in text_generality",
        ),
        (
            replace(record, text_locality=(replace(record.text_locality[0], fields={"x": 1}),)),
            "no place for something in text_locality",
        ),
    ]
    for bad, text in cases:
        with pytest.raises(DataError, match=text):
            write_records(tmp_path / "out.json", [record, bad])
    assert not (tmp_path / "out.json").exists()
    with pytest.raises(DataError) as caught:
        write_records(tmp_path / "out.json", [bad for bad, _ in cases])
    assert len(caught.value.problems) == len(cases)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"src": 1}', "not the format it says"),
        ('[{"src": ', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[" + "9" * 5000 + "]", "not JSON"),
    ],
)
def test_files_that_are_no_list_of_records(tmp_path, text, reason):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(DataError, match=reason):
        list(read_records(tmp_path / "data.json"))


def test_deep_nesting_is_one_bad_record(tmp_path):
    fine, deep = "[" * 49 + "]" * 49, "[" * 51 + "]" * 51
    good = json.dumps(item(1))[:-1]
    text = f'[{good}, "x": {fine}}}, {good}, "x": {deep}}}, {"[" * 500}{"]" * 500}]'
    (tmp_path / "data.json").write_text(text)
    one, two, three = read_records(tmp_path / "data.json")
    assert isinstance(one, EditRecord)
    assert {(p.reason, p.text) for p in (two, three)} == {
        ("malformed record", "record: nested over 50 levels deep")
    }


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
texts = st.text(st.characters(codec=None), max_size=8) | st.just("../x") | st.just("\0")
near_items = st.fixed_dictionaries(
    {}, optional=dict.fromkeys((*FIELDS, "port_new", "note"), texts | json_values)
)
good_items = st.fixed_dictionaries(
    {name: texts.filter(str.strip) for name in FIELDS},
    optional={"note": json_values.filter(lambda v: "nan" not in repr(v))},
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(json_values | near_items, max_size=4) | json_values)
def test_any_json_gives_records_or_named_problems(tmp_path_factory, document):
    path = tmp_path_factory.mktemp("any") / "data.json"
    path.write_text(json.dumps(document))
    # No such images are here, so nothing can be left.
    with pytest.raises(DataError) as caught:
        load_records(path, on_error="skip", progress=False)
    assert caught.value.problems
    assert all(p.where.startswith(str(path)) for p in caught.value.problems)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(good_items, min_size=1, max_size=3))
def test_what_is_read_is_written_back(tmp_path_factory, items):
    folder = tmp_path_factory.mktemp("round")
    found = list(read_records(write(folder / "in.json", items)))
    kept = [i for i, r in zip(items, found, strict=True) if isinstance(r, EditRecord)]
    records = [r for r in found if isinstance(r, EditRecord)]
    write_records(folder / "out.json", records)
    assert json.loads((folder / "out.json").read_text()) == kept
    back = list(read_records(folder / "out.json"))
    assert [replace(r, where="", id="", request=replace(r.request, id="")) for r in back] == [
        replace(r, where="", id="", request=replace(r.request, id="")) for r in records
    ]
