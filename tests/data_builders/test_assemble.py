"""Finished samples become files that other tools read, and nothing leaks between them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from data_builders.samples import Keeper, Sample
from data_builders.stages import assemble
from data_builders.stages.assemble import CROSSES, IN_SCOPE, AssembleOptions, write_set
from data_builders.tables import defect_table
from editing.audit import audit
from editing.datasets import FIELDS, IMAGES, load_records, write_items
from tests.data_builders.finished_samples import (
    build_of,
    digests,
    draw,
    finished,
    pictures_in,
)
from tests.editing.edit_items import DATA
from tests.editing.test_datasets import published


@pytest.fixture
def pictures(tmp_path):
    return pictures_in(tmp_path)


def kinds(found):
    return {(defect.id, defect.kind) for defect in found.defects}


def test_every_field_says_what_the_sample_says(pictures, tmp_path):
    samples = finished(pictures)
    found = write_set(samples, AssembleOptions(), pictures, tmp_path)
    assert found.defects == []
    assert found.rejected == []
    assert {split: len(own) for split, own in found.samples.items()} == {"train": 4, "eval": 2}
    items = json.loads(found.files["train"].read_text())
    sample, item = samples[0], items[0]
    assert tuple(item)[:11] == FIELDS
    assert item == {
        "src": sample.question, "pred": sample.prediction, "alt": sample.target,
        "rephrase": sample.rephrase, "image": "images/source/sub/0.png",
        "image_rephrase": "images/made/imagine/0.png", "loc": "Who was king 0?",
        "loc_ans": "Louis 0", "m_loc": "images/image/0.png", "m_loc_q": "What colour?",
        "m_loc_a": "red", "id": "q0", "question_id": 0,
    }  # fmt: skip
    for name, reference in zip(IMAGES, (sample.image, sample.image_rephrase), strict=False):
        assert (found.images / item[name]).read_bytes() == pictures.file(reference).read()
    assert len(load_records(found.files["eval"], progress=False).records) == 2
    assert found.pictures == 18


def test_the_same_again_is_the_same_bytes(pictures, tmp_path):
    samples = finished(pictures)
    write_set(samples, AssembleOptions(), pictures, tmp_path)
    first = digests(tmp_path / "data")
    (tmp_path / "data" / "stray.txt").write_text("left over")
    write_set(samples, AssembleOptions(), pictures, tmp_path)
    assert digests(tmp_path / "data") == first
    assert not list(tmp_path.glob(".data*"))
    assert sum(name.endswith(".parquet") for name in first) == 2


def test_links_share_the_file_and_copies_do_not(pictures, tmp_path):
    samples = finished(pictures)
    own = pictures.roots["source"] / "sub" / "0.png"
    for how, links in (("link", 2), ("copy", 1)):
        found = write_set(samples, AssembleOptions(images=how), pictures, tmp_path)
        written = found.images / "images/source/sub/0.png"
        assert written.read_bytes() == own.read_bytes()
        assert own.stat().st_nlink == links


def test_where_links_cannot_be_made_it_copies(pictures, tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(assemble.os, "link", refuse)
    found = write_set(finished(pictures), AssembleOptions(), pictures, tmp_path)
    assert found.defects == []
    assert (found.images / "images/image/0.png").stat().st_nlink == 1


def test_references_need_one_folder(pictures, tmp_path):
    samples = finished(pictures)
    options = AssembleOptions(images="reference", parquet="none")
    with pytest.raises(ValueError, match="below one folder"):
        write_set(samples, options, pictures, tmp_path)
    assert not (tmp_path / "data").exists()
    one = type(pictures)(dict.fromkeys(pictures.roots, tmp_path))
    below = [
        s.with_(
            image=s.image.replace(":", ":source/"),
            image_rephrase=s.image_rephrase.replace(":", ":made/"),
            image_locality=dataclasses.replace(s.image_locality, image=f"image:pool/{n}.png"),
        )
        for n, s in enumerate(samples)
    ]
    found = write_set(below, options, one, tmp_path)
    assert found.defects == []
    assert found.images == tmp_path
    assert not (tmp_path / "data" / "images").exists()
    assert json.loads(found.files["eval"].read_text())[0]["m_loc"] == "pool/4.png"


def test_equal_bytes_are_one_image_whatever_they_are_called(pictures, tmp_path):
    samples = finished(pictures)
    draw(pictures.roots["image"] / "twin.png", 0)  # the bytes of sub/0.png, an edit image
    twin = samples[5].with_(image_locality=Keeper("What colour?", "red", "image:twin.png"))
    found = write_set([*samples[:5], twin], AssembleOptions(), pictures, tmp_path)
    assert kinds(found) == {("q5", CROSSES), ("q0", CROSSES)}
    own = samples[3].with_(image_locality=twin.image_locality)
    found = write_set([*samples[:3], own], AssembleOptions(), pictures, tmp_path)
    assert kinds(found) == {("q3", "locality image is edited")}


def test_a_generality_image_may_not_be_locality_too(pictures, tmp_path):
    samples = finished(pictures)
    keeper = Keeper("What colour?", "red", samples[1].image_rephrase)
    found = write_set(
        [samples[0].with_(image_locality=keeper), *samples[1:]],
        AssembleOptions(), pictures, tmp_path,
    )  # fmt: skip
    assert kinds(found) == {("q0", IN_SCOPE)}


def test_keepers_of_one_split_are_defects_in_the_other(pictures, tmp_path):
    samples = finished(pictures)
    last = samples[5].with_(
        text_locality=samples[0].text_locality, image_locality=samples[1].image_locality
    )
    found = write_set([*samples[:5], last], AssembleOptions(), pictures, tmp_path)
    assert {("q5", "text locality shared"), ("q5", "image locality shared")} <= kinds(found)


@pytest.mark.parametrize(
    ("change", "reason", "fault"),
    [
        ({"rephrase": ""}, "empty field", False),
        ({"rephrase": "What is number 2?"}, "rephrase equals src", False),
        ({"rephrase": "I'm sorry, I cannot help."}, "refusal", False),
        ({"target": "A hat."}, "nothing to edit", False),
        ({"target": " "}, "empty target", False),
        ({"text_locality": None}, "empty field", False),
        ({"image_locality": None}, "empty field", False),
        ({"image_rephrase": "source:sub/2.png"}, "image rephrase is the image", False),
        ({"image": "source:sub/none.png"}, "missing image", True),
        ({"image": "source:../../none.png"}, "image outside root", True),
        ({"image": "elsewhere:1.png"}, "unknown root of an image", True),
    ],
)
def test_a_record_with_a_defect_is_left_out_and_counted(change, reason, fault, pictures, tmp_path):
    samples = finished(pictures)
    samples[2] = samples[2].with_(**change)
    found = write_set(samples, AssembleOptions(), pictures, tmp_path)
    assert [(r.id, r.reason, r.fault) for r in found.rejected] == [("q2", reason, fault)]
    assert [s.id for s in found.samples["train"]] == ["q0", "q1", "q3"]
    assert found.defects == []


def test_a_second_edit_of_the_same_is_left_out(pictures, tmp_path):
    samples = finished(pictures)
    samples[2] = samples[2].with_(question=samples[0].question, image=samples[0].image)
    found = write_set(samples, AssembleOptions(), pictures, tmp_path)
    assert [(r.id, r.reason) for r in found.rejected] == [("q2", "duplicate edit")]
    assert found.defects == []


def test_defective_records_can_be_kept_and_are_then_named(pictures, tmp_path):
    samples = finished(pictures)
    samples[5] = samples[5].with_(rephrase='"Which thing?"')
    found = write_set(samples, AssembleOptions(defective="keep"), pictures, tmp_path)
    assert found.rejected == []
    (defect,) = found.defects
    assert (defect.split, defect.record, defect.id) == ("eval", 1, "q5")
    assert defect.kind == "rephrase in quotes"


def test_a_picture_with_an_absolute_or_winding_name_stays_in_the_folder(pictures, tmp_path):
    samples = finished(pictures)
    absolute = (pictures.roots["source"] / "sub" / "0.png").resolve()
    samples[0] = samples[0].with_(image=f"source:{absolute}")
    samples[1] = samples[1].with_(image="source:sub/../sub/1.png")
    before = digests(pictures.roots["source"])
    found = write_set(samples, AssembleOptions(), pictures, tmp_path)
    items = json.loads(found.files["train"].read_text())
    assert items[0]["image"] == f"images/source{absolute}"
    assert items[1]["image"] == "images/source/sub/1.png"
    assert found.defects == []
    assert digests(pictures.roots["source"]) == before


def test_a_full_disk_leaves_what_was_there(pictures, tmp_path, monkeypatch):
    samples = finished(pictures)
    write_set(samples, AssembleOptions(), pictures, tmp_path)
    before = digests(tmp_path / "data")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assemble.os, "link", full)
    monkeypatch.setattr(assemble.shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        write_set(samples[:2], AssembleOptions(), pictures, tmp_path)
    assert digests(tmp_path / "data") == before
    assert not list(tmp_path.glob(".data*"))


def test_parquet_loads_with_pictures_and_fields(pictures, tmp_path):
    from datasets import load_dataset

    samples = finished(pictures)
    found = write_set(samples, AssembleOptions(), pictures, tmp_path)
    files = {p.name.partition("-")[0]: str(p) for p in found.parquet}
    loaded = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 4, "eval": 2}
    row = loaded["eval"][1]
    assert (row["id"], row["src"], row["alt"]) == ("q5", samples[5].question, samples[5].target)
    assert row["image_rephrase"].getpixel((0, 0)) == (16 * 7, 0, 90)


def test_all_files_of_a_build_and_its_defects_by_name(pictures, tmp_path):
    options, samples = AssembleOptions(), finished(pictures)
    build = build_of(pictures, tmp_path, options)
    keeper = samples[0].image_locality
    found = assemble.assemble(build, [*samples[:5], samples[5].with_(image_locality=keeper)])
    assert len(found.defects) == 3
    rows = defect_table(tmp_path / assemble.DEFECTS)
    assert list(rows.columns[0].cells) == ["image locality shared", CROSSES, CROSSES]
    assert "1 (q5): " in next(iter(rows.columns[3].cells))
    again = assemble.assemble(build, samples)
    assert again.defects == []
    assert not (tmp_path / assemble.DEFECTS).exists()
    first = digests(tmp_path)
    assert {"README.md", "gallery.html", "data/train.json", "data/eval.json"} <= set(first)
    assemble.assemble(build, samples)
    assert digests(tmp_path) == first


def test_options_that_contradict_each_other_are_named():
    with pytest.raises(ValueError, match="images: reference"):
        AssembleOptions(check_images=False)
    with pytest.raises(ValueError, match="parquet: paths"):
        AssembleOptions(check_images=False, images="reference")


def passed_through(path, tmp_path, split="eval"):
    """A file of edit records read as samples and written again, images not at hand."""
    from data_builders.pictures import Pictures
    from data_builders.sources.easyedit import EasyEdit, EasyEditOptions

    source = EasyEdit(EasyEditOptions(str(path), split=split))
    pictures = Pictures(source.roots())
    samples = list(source.read(pictures))
    assert all(isinstance(sample, Sample) for sample in samples)
    back = [Sample.of_json(json.loads(json.dumps(s.as_json()))) for s in samples]
    assert back == samples
    options = AssembleOptions(
        images="reference", check_images=False, defective="keep", parquet="paths"
    )
    return write_set(back, options, pictures, tmp_path / "out")


def same_records(path, found, split="eval"):
    before = json.loads(Path(path).read_text())
    after = json.loads(found.files[split].read_text())
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        assert {name: new.get(name) for name in FIELDS} == {name: old.get(name) for name in FIELDS}
    return before, after


def test_a_file_of_others_passes_through_with_its_defects_and_further_fields(tmp_path):
    item = dict.fromkeys(FIELDS, "text") | {"image": "a.png", "image_rephrase": "b.png"}
    hops = [{"port_q": "And?", "port_a": "so"}]
    silent = {k: v for k, v in item.items() if k != "pred"} | {"alt": " x\ud800", "port_new": hops}
    write_items(tmp_path / "file.json", [item, silent, item | {"pred": "", "m_loc": "a.png"}])
    found = passed_through(tmp_path / "file.json", tmp_path)
    before, after = same_records(tmp_path / "file.json", found)
    assert [{k: v for k, v in new.items() if k != "id"} for new in after] == before
    assert audit(str(tmp_path / "file.json")).counts() == found.audits["eval"].counts()


def test_a_broken_record_is_named(tmp_path):
    from data_builders.pictures import Pictures
    from data_builders.sources.easyedit import EasyEdit, EasyEditOptions

    write_items(tmp_path / "file.json", [dict.fromkeys(FIELDS, "x"), {"src": 3}, 7])
    found = list(EasyEdit(EasyEditOptions(str(tmp_path / "file.json"))).read(Pictures({})))
    assert [(r.id, r.fault) for r in found[1:]] == [("1", True), ("2", True)]
    assert found[1].text == "src: expected text, got 3"


@published
@pytest.mark.parametrize("name", ["vqa_eval", "caption_eval_edit"])
def test_the_published_file_passes_through_unchanged_in_meaning(name, tmp_path):
    path = DATA / "mmedit" / f"{name}.json"
    found = passed_through(path, tmp_path)
    same_records(path, found)
    theirs, ours = audit(str(path)), found.audits["eval"]
    assert theirs.counts() == ours.counts()
    assert sum(theirs.counts().values()) > 100
    assert theirs.facts == ours.facts
