from __future__ import annotations

import json

import pytest

from editing.audit import KINDS, audit, fix
from editing.audit.auditing import ON_DISK, SHARED, UNUSUAL
from editing.audit.mending import changes_file, fix_file
from editing.datasets import load_items, load_records
from mmtune import cli
from mmtune.data.records import DataError
from tests.data.pictures import write_pictures
from tests.editing.edit_items import DATA, hop, images_of, item, write
from tests.editing.test_datasets import published

MENDED = [kind.name for kind in KINDS.values() if kind.fix == "mended"]
LEFT_OUT = [kind.name for kind in KINDS.values() if kind.fix == "left out"]
SORRY = "I'm sorry, but I cannot rewrite this question."
LONG = " ".join(["word"] * 26)


def counts(found):
    return {kind: count for kind, count in found.counts().items() if count}


# Counts of the published files, as they are stated beside them.
PUBLISHED = {
    ("mmedit/vqa_eval", "mmedit/vqa_train"): {
        "nothing to edit": 4,
        "duplicate edit": 1,
        "rephrase equals src": 45,
        "refusal": 1,
        "rephrase in quotes": 562,
        "several rephrases": 13,
        "talk around the rephrase": 8,
        "long rephrase": 3,
        "locality image is edited": 56,
        "edit image shared": 1380,
        "image locality shared": 2093,
        "locality answer is not the usual one": 2093 - 1181,
    },
    ("mmedit/vqa_train", None): {
        "nothing to edit": 6,
        "duplicate edit": 2,
        "rephrase equals src": 117,
        "refusal": 1,
        "rephrase in quotes": 1686,
        "several rephrases": 15,
        "talk around the rephrase": 35,
        "long rephrase": 4,
        "locality image is edited": 512,
        "locality answer is not the usual one": 2734,
    },
    ("mmedit/caption_eval_edit", "mmedit/caption_train_edit"): {
        "outer blanks": 144,
        "locality image is edited": 28,
        "image locality shared": 1000,
        "locality answer is not the usual one": 439,
    },
    ("mmedit/caption_eval_edit", "mmedit/vqa_eval"): {
        "outer blanks": 144,
        "locality image is edited": 28,
        "image locality shared": 1000,
        "text locality shared": 1000,
        "locality answer is not the usual one": 439,
    },
    ("vlkeb/eval", None): {"graph name as prediction": 2863},
    ("vlkeb/eval_edit_onehop", "vlkeb/eval"): {
        "graph name as prediction": 1162,
        "two answers to one hop": 93,
        "edit shared": 1278,
        "edit image shared": 1278,
        "image locality shared": 1278,
        "text locality shared": 1278,
    },
}
FACTS = {
    ("mmedit/vqa_eval", "mmedit/vqa_train"): {
        "well-formed records": 2093,
        "different edit images": 1390,
        "edit images that the other file has too": 845,
        "records whose image locality has the same number there": 2093,
        "locality images that are edit images": 56,
        "targets yes or no": 289,
        "targets that are a number": 352,
        "targets of one word": 1665,  # 79.6 %
        "image localities that are in the pool": 2093,
        "of which the answer is an annotator's": 2093,
        "of which the answer is the usual one": 1181,
        "images of the pool that are edit images": 155,
    },
    ("mmedit/vqa_train", None): {"images of the pool that are edit images": 408},
    ("mmedit/caption_eval_edit", "mmedit/caption_train_edit"): {
        "different rephrases": 19,
        "edit images that the other file has too": 0,
        "records whose image locality has the same number there": 1000,
        "locality images that are edit images": 28,
    },
    ("mmedit/caption_eval_edit", "mmedit/vqa_eval"): {
        "records whose image locality has the same number there": 1000,
    },
    ("vlkeb/eval", None): {
        "folders of edit images": 2847,
        "both images in one folder": 3174,
        "different targets": 2845,
        "different image-locality pairs": 2034,
        "locality images that are edit images": 0,
    },
    ("vlkeb/eval_edit_onehop", "vlkeb/eval"): {
        "records there with the same target": 1278,
        "different image-locality pairs": 984,
        "locality images that are edit images": 0,
    },
}


def published_file(name):
    return None if name is None else str(DATA / f"{name}.json")


@published
@pytest.mark.parametrize("files", PUBLISHED, ids=lambda files: f"{files[0]}-{files[1]}")
def test_published_files_have_the_counts_stated_beside_them(files):
    path, against = map(published_file, files)
    pool = published_file("mmedit/okvqa_loc") if files[0].startswith("mmedit") else None
    found = audit(path, against, pool=pool)
    assert counts(found) == PUBLISHED[files]
    assert {name: found.fact(name) for name in FACTS[files]} == FACTS[files]


@published
@pytest.mark.parametrize("name", ["mmedit/vqa_eval", "mmedit/caption_eval_edit"])
def test_the_copy_of_a_published_file_is_clean(name, tmp_path):
    path, out = published_file(name), tmp_path / "clean.json"
    fixed = fix_file(path, out)
    source, copied = load_items(path), load_items(out)
    left = audit(str(out))
    assert not set(counts(left)) & {*MENDED, *LEFT_OUT}
    lines = [json.loads(line) for line in changes_file(out).read_text().splitlines()]
    changed = {line["record"]: line for line in lines}
    assert len(changed) == fixed.mended + fixed.left_out == len(lines)
    assert len(copied) == len(source) - fixed.left_out
    if name == "mmedit/vqa_eval":
        # 4 + 1 + 45 + 1; one record has two of these defects, none is made by mending.
        assert fixed.left_out == len({n for k in LEFT_OUT for n in audit(path).having(k)})
    # Every record of the source is in the copy as it was, in it as the line says, or left out.
    at = iter(enumerate(copied))
    for number, old in enumerate(source):
        line = changed.get(number, {"becomes": -1, "mends": []})
        if line["becomes"] is None:
            continue
        place, new = next(at)
        assert line["becomes"] in (-1, place)
        after = {m["field"]: m["after"] for m in line["mends"]}
        assert new == old | after
        assert all(old[m["field"]] == m["before"] for m in line["mends"])
    assert next(at, None) is None


CASES = {
    "malformed record": [item(0, loc=5)],
    "missing field": [item(0, image=None)],
    "empty field": [item(0, m_loc_a=" ")],
    "empty target": [item(0, alt="\t")],
    "nothing to edit": [item(0, pred="0 Cups.")],
    "duplicate edit": [item(0), item(1), item(0, alt="9 cups", loc="else")],
    "rephrase equals src": [item(0, rephrase="What is on shelf 0?")],
    "image rephrase is the image": [item(0, image_rephrase="shelves/0.png")],
    "refusal": [item(0, rephrase=SORRY)],
    "rephrase in quotes": [item(0, rephrase=' "What stands there?"')],
    "several rephrases": [item(0, rephrase="What stands there?\nWhat is there?")],
    "talk around the rephrase": [item(0, rephrase='Rewritten question: "What is there?"')],
    "outer blanks": [item(0, alt="2 cups\n")],
    "long rephrase": [item(0, rephrase=LONG)],
    "graph name as prediction": [item(0, pred="Shelf_(furniture)")],
    "two answers to one hop": [item(0, port_new=[hop(), hop(port_edit_a="a smith")])],
    "locality image is edited": [item(0, m_loc="shelves/1.png"), item(1)],
}
ALSO = {"rephrase in quotes": {"outer blanks"}}  # the blank in front


@pytest.mark.parametrize("kind", CASES)
def test_every_defect_is_found_alone_and_mended_or_left_out(kind, tmp_path):
    items = [*CASES[kind], item(7)]
    found = audit(write(tmp_path / "data.json", items))
    assert counts(found) == dict.fromkeys({kind, *ALSO.get(kind, ())}, 1)
    (record,) = found.having(kind)
    assert record == (2 if kind == "duplicate edit" else 0)
    fixed = fix(items)
    left = audit(write(tmp_path / "clean.json", fixed.items))
    if KINDS[kind].fix == "stays":
        assert fixed.items == items
        assert counts(left) == {kind: 1}
        return
    assert counts(left) == {}
    (change,) = fixed.changes
    assert change.record == record
    if KINDS[kind].fix == "mended":
        assert len(fixed.items) == len(items)
        assert change.becomes == 0
        assert kind in [k for mend in change.mends for k in mend.kinds]
    else:
        assert len(fixed.items) == len(items) - 1
        assert change.becomes is None
        assert kind in [finding.kind for finding in change.because]
    assert fixed.items[-1] == item(7)


def test_no_kind_is_without_a_test():
    assert {*KINDS} == {*CASES, *SHARED, *ON_DISK, UNUSUAL}


def test_a_good_file_has_no_defect(tmp_path):
    items = [item(n, port_new=[hop()]) for n in range(5)]
    found = audit(write(tmp_path / "data.json", items))
    assert counts(found) == {}
    assert fix(items).items == items
    assert fix(items).changes == []


def test_what_is_shared_with_another_file(tmp_path):
    train = [
        item(50, image="shelves/0.png"),
        item(51, image="shelves/1.png", src="What is on shelf 1?", alt="else"),
        item(52, m_loc="around/2.png"),
        item(53, m_loc="around/3.png", m_loc_q="another question"),
        item(54, loc="who built tower 4"),
    ]
    path = write(tmp_path / "eval.json", [item(n) for n in range(5)])
    found = audit(path, write(tmp_path / "train.json", train))
    shared = {kind: found.having(kind) for kind in counts(found)}
    assert shared == {
        "edit shared": [1],
        "edit image shared": [0, 1],
        "image locality shared": [2],
        "text locality shared": [4],
    }
    assert found.fact("edit images that the other file has too") == 2
    assert found.fact("records whose src is there too") == 1
    assert found.fact("records there with the same target") == 0
    assert found.fact("records whose image locality has the same number there") == 1
    alone = audit(path)
    assert set(shared) <= set(alone.unchecked)
    assert not set(shared) & set(alone.counts())


def test_images_are_decoded(tmp_path):
    items = [item(n) for n in range(3)]
    write_pictures(tmp_path, [n for n in images_of(items) if n != "other/1.png"])
    (tmp_path / "around" / "2.png").write_bytes(b"no picture")
    items.append(item(3, image="../out.png", image_rephrase="shelves/0.png", m_loc="other/0.png"))
    path = write(tmp_path / "data.json", items)
    found = audit(path, images=str(tmp_path), progress=False)
    assert [(f.kind, f.record, f.field) for f in found.findings] == [
        ("missing image", 1, "image_rephrase"),
        ("broken image", 2, "m_loc"),
        ("broken image", 3, "image"),
    ]
    assert found.findings[0].text == f"no file 'other/1.png' in {tmp_path}"
    named = next(f for f in found.facts if f.name == "images that are missing or broken")
    assert (named.value, named.of) == (3, 10)
    fixed = fix(items, images=str(tmp_path), progress=False)
    assert fixed.items == items[:1]
    assert [c.record for c in fixed.changes] == [1, 2, 3]
    write(tmp_path / "clean.json", fixed.items)
    assert len(load_records(tmp_path / "clean.json", progress=False).records) == 1


def test_answers_of_the_pool(tmp_path):
    pool = [
        {"question": "What colour is the door?", "image": f"around/{n}.png", "answer": answers}
        for n, answers in enumerate([["green", "green", "red"], ["red", "green"], ["blue"]])
    ]
    path = write(tmp_path / "data.json", [*(item(n) for n in range(3)), item(9)])
    found = audit(path, pool=write(tmp_path / "pool.json", pool))
    assert found.having("locality answer is not the usual one") == [1, 2]
    assert found.fact("image localities that are in the pool") == 3
    assert found.fact("of which the answer is an annotator's") == 2
    assert found.fact("of which the answer is the usual one") == 1
    bad = write(tmp_path / "bad.json", [*pool, pool[0] | {"answer": "green"}])
    with pytest.raises(DataError, match=r"bad\.json, record 3: malformed record"):
        audit(path, pool=bad)


def test_command_shows_counts_and_examples_and_says_by_its_code_whether_all_is_well(
    tmp_path, capsys
):
    good = write(tmp_path / "good.json", [item(0), item(1)])
    assert cli.main(["audit", good]) == 0
    shown = capsys.readouterr().out
    assert "not looked for without --against FILE: edit shared, edit image shared" in shown
    assert "not looked for without --images DIR: missing image, broken image" in shown
    bad = write(tmp_path / "bad.json", [item(0, rephrase='"[bold]Which?[/bold]"'), item(1)])
    assert cli.main(["audit", bad, "--json", str(tmp_path / "new" / "found.json")]) == 1
    shown = capsys.readouterr().out
    assert "rephrase in quotes" in shown
    assert "'\"[bold]Which?[/bold]\"'" in shown
    found = json.loads((tmp_path / "new" / "found.json").read_text())
    assert found["records"] == 2
    defect = found["defects"]["rephrase in quotes"]
    assert (defect["records"], defect["in"], defect["fix"]) == (1, [0], "mended")
    assert defect["examples"][0]["text"] == "'\"[bold]Which?[/bold]\"'"
    assert found["defects"]["refusal"]["records"] == 0
    assert found["facts"]["different targets"] == {"value": 2, "of": 2}


def test_command_writes_a_clean_copy_once(tmp_path, capsys):
    items = [item(0, rephrase='"Which?"'), item(1, alt=""), item(2)]
    path, out = write(tmp_path / "data.json", items), tmp_path / "new" / "clean.json"
    assert cli.main(["audit", path, "--fix", str(out)]) == 0  # nothing is left in the copy
    shown = capsys.readouterr().out
    assert f"copy:    {out} (2 records; 1 mended, 1 left out)" in shown
    assert json.loads(out.read_text()) == [items[0] | {"rephrase": "Which?"}, items[2]]
    lines = [json.loads(line) for line in changes_file(out).read_text().splitlines()]
    assert [(n["record"], n["action"], n["becomes"]) for n in lines] == [
        (0, "mended", 0),
        (1, "left out", None),
    ]
    assert sorted(p.name for p in out.parent.iterdir()) == ["clean.changes.jsonl", "clean.json"]
    assert json.loads((tmp_path / "data.json").read_text()) == items
    assert cli.main(["audit", path, "--fix", str(out)]) == cli.USER_ERROR
    assert "--overwrite" in capsys.readouterr().err
    keep = ["--keep", "rephrase-in-quotes", "--overwrite"]
    assert cli.main(["audit", path, "--fix", str(out), *keep]) == 1
    assert json.loads(out.read_text()) == [items[0], items[2]]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--fix", "data.json"], "would replace data.json"),
        (["--fix", "out.json", "--keep", "refusals"], "Did you mean 'refusal'?"),
        (["--fix", "out.json", "--keep", "long-rephrase"], "expected one of"),
        (["--fix", "out.json", "--keep", "empty-target"], "expected one of"),
        (["--examples", "-1"], "--examples must be 0 or more"),
        (["--against", "nowhere.json"], "nowhere.json: missing file"),
        (["--fix", "out.json"], "no copy was written"),
    ],
)
def test_command_refuses_what_the_user_can_mend(tmp_path, monkeypatch, capsys, arguments, text):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data.json", [item(0, alt="")])
    assert cli.main(["audit", "data.json", *arguments]) == cli.USER_ERROR
    assert text in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["data.json"]
