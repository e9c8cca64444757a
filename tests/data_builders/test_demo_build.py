"""Both recipes from end to end with the zoo's models; `make demo-build` is one, made smaller."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from data_builders.config import load_build_config
from data_builders.pipeline import build
from data_builders.sources.clipart import SPLITS
from editing.audit import audit
from editing.config import load_edit_config
from editing.datasets import load_records
from editing.evaluation.running import evaluate
from mmtune.zoo.tiny_llava.questions import drawings
from tests.data_builders.finished_samples import digests

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["limit=6", "pool_limit=4", "shard_size=8", "stages.locality.reuse=true"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def built(runs):
    return build(load_build_config("demo/build", SMALL), runs)


def files(folder):
    return {path.stem: path for path in sorted((folder / "data").glob("*.json"))}


def test_it_has_no_defect(built):
    assert (built.defects, built.faults, built.complete) == (0, 0, True)
    for path in files(built.folder).values():
        assert not audit(str(path), images=str(path.parent), progress=False).findings


def test_every_record_is_a_mistake_with_another_drawing_of_the_thing(built):
    items = [i for path in files(built.folder).values() for i in json.loads(path.read_text())]
    assert 2 <= len(items) <= 6
    rows = [row for name, part in SPLITS["test"] for row in drawings(name, part)]
    things = {r["id"].removesuffix(".svg").replace("/", "-"): r["thing"] for r in rows}
    for item in items:
        own, other, kept = (
            things[Path(item[n]).stem] for n in ("image", "image_rephrase", "m_loc")
        )
        answer = {"name": own.noun, "kind": own.kind}[item["kind"]]
        assert item["alt"] == answer
        assert item["pred"].lower() != answer
        assert other == own
        assert kept != own
        assert item["rephrase"] != item["src"]


def test_the_same_again_changes_nothing(built, runs):
    before = digests(built.folder)
    again = build(load_build_config("demo/build", SMALL), runs)
    assert digests(built.folder) == before
    assert again.reports == built.reports


def test_the_page_and_the_card_tell_of_it(built):
    page = (built.folder / "gallery.html").read_text(encoding="utf-8")
    card = (built.folder / "README.md").read_text(encoding="utf-8")
    assert "zoo:tiny-llava" in page
    assert "0 defects" in page
    assert "public domain (Open Clip Art Library)" in card
    assert yaml.safe_load(card.split("---\n")[1])["configs"]


def test_the_edit_demo_reads_what_the_build_demo_writes(built):
    config = load_edit_config("demo/edit")
    name = load_build_config("demo/build").name
    path = Path(config.data.path)
    assert path.parts[:3] == ("runs", name, "data")
    assert path.stem in files(built.folder)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^demo-edit: demo-build$", makefile, flags=re.MULTILINE)


def test_the_set_runs_in_mmtune_edit(built, runs):
    config = load_edit_config("demo/edit", ["data.limit=1"])
    data = replace(config.data, path=str(files(built.folder)["eval"]))
    report = evaluate(replace(config, data=data, editors={"ike": config.editors["ike"]}), runs)
    assert report.records == 1
    base = json.loads((runs / "demo-edit" / "base.jsonl").read_text().splitlines()[0])
    (record,) = load_records(data.path, limit=1, progress=False).records
    assert record.prediction in json.dumps(base)


CAPTIONS = """\
name: captions
recipe: eic
model: {name: "zoo:tiny-llava"}
source: {format: folder, path: FOLDER, prompt: a drawing of, licence: public domain}
pools:
  text: {format: facts}
  image: {format: clipart, split: test, seed: 1, kinds: [kind]}
stages:
  select: {threshold: 0.9}
  imagine: {by: pairs}
  filter: {by: clip, model: "zoo:tiny-clip", min_text: null, min_image: null}
  locality: {splits: {train: 1, eval: 1}, reuse: true}
limit: 4
pool_limit: 4
shard_size: 4
"""


def described_drawings(folder):
    """Two drawings each of four things, as people keep them: images and metadata.jsonl."""
    folder.mkdir()
    lines, things = [], Counter()
    for row in drawings("clipart", "test"):
        noun, data = row["thing"].noun, row["image"]["bytes"]
        if things[noun] < 2 and (noun in things or len(things) < 4):
            things[noun] += 1
            ending = "png" if data.startswith(b"\x89PNG") else "jpg"
            name = f"{noun}-{things[noun]}.{ending}"
            (folder / name).write_bytes(data)
            captions = [f"a drawing of {row['title']}", f"a drawing of {row['thing'].named}"]
            lines.append({"file_name": name, "captions": captions, "concept": noun})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def test_captions_from_a_folder_of_ones_own(tmp_path):
    described_drawings(tmp_path / "mine")
    path = tmp_path / "captions.yaml"
    path.write_text(CAPTIONS.replace("FOLDER", str(tmp_path / "mine")), encoding="utf-8")
    found = build(load_build_config(path), tmp_path / "runs")
    assert (found.defects, found.faults) == (0, 0)
    items = [i for path in files(found.folder).values() for i in json.loads(path.read_text())]
    assert items
    for item in items:
        noun = Path(item["image"]).stem.rpartition("-")[0]
        assert item["src"] == "a drawing of"
        assert item["rephrase"] != item["src"]
        assert item["alt"].startswith("a drawing of ")
        assert Path(item["image_rephrase"]).stem.rpartition("-")[0] == noun
        assert item["image"].startswith("images/source/")
    card = (found.folder / "README.md").read_text(encoding="utf-8")
    assert "E-IC records for zoo:tiny-llava" in card
    assert "records by licence: public domain" in card
