"""The page of a run: what it shows, and that every picture loads."""

from __future__ import annotations

import base64
import io
import json
import re
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from editing.evaluation.gallery import LABELS, gallery
from editing.evaluation.plots import _curves
from editing.evaluation.summary import RowSummary
from editing.loading import records_of
from editing.metrics.aggregate import Score, summarize
from editing.metrics.definitions import Kind, definitions_of
from mmtune import cli
from mmtune.report.pictures import Pictures
from tests.editing.evaluation.runs import config_of, items, limited, lines, picture, run, setup
from tests.editing.tiny import tiny
from tests.report.browser import looks_right

SVG = "{http://www.w3.org/2000/svg}"
EDITORS = {
    "tuned": {"editor": "ft", "lr": 0.05},
    "picky": {"editor": "nudge", "size": 3.0, "fails": "1"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, mllm):
    """(folder of a run, its config) of a sequential run in which something failed."""
    from _pytest.monkeypatch import MonkeyPatch

    from tests.editing.evaluation.runs import add_editors

    folder = tmp_path_factory.mktemp("page")
    with MonkeyPatch.context() as patch:
        add_editors(patch)
        data = setup(folder, 4, "vlkeb")
        config = config_of(folder, data, EDITORS, "sequential", counts=[2, 4], compat=["mmedit"])
        run(folder, config, mllm=mllm)
    return folder / "runs" / "run", config


@pytest.fixture(scope="module")
def page(made):
    return (made[0] / "report.html").read_text(encoding="utf-8")


def test_the_page_looks_right_in_a_browser(made, tmp_path):
    looks_right(made[0] / "report.html", tmp_path)


def test_the_page_needs_nothing_else_and_every_picture_loads(page):
    assert "<script" not in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    uris = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(uris) == 4 * 3  # of each record its image, the other one, and the one around
    for uri in uris:
        assert Image.open(io.BytesIO(base64.b64decode(uri))).convert("RGB").size == (32, 32)
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 7 + 7  # bars and curves, a picture per column
    for text in drawings:
        assert ET.fromstring(text).get("aria-label").endswith(", %")


@pytest.mark.parametrize("editors", [1, 7, 17, 30])
def test_every_editor_is_named_beside_the_curves(editors):
    """matplotlib squeezes axes, and cuts off legends, that are lower than their legend."""
    kind: Kind = "reliability"
    definition = definitions_of(kind)[0]
    found = summarize(definition, [Score(1, 1), Score(0, 1)], None, resamples=9)
    key = (kind, definition.name)
    rows = [
        RowSummary(f"editor {i}", count, 9, 0.1, [], {key: found})
        for i in range(editors)
        for count in (1, 10)
    ]
    drawing = ET.fromstring(_curves("reliability", key, rows))
    height = float(drawing.get("viewBox").split()[-1])
    texts = {text.text: float(text.get("y")) for text in drawing.iter(f"{SVG}text")}
    assert 0 < texts[f"editor {editors - 1}"] < height
    frame = next(part for part in drawing.iter() if part.get("id") == "patch_2")
    ends = re.findall(r"[-\d.]+ ([-\d.]+)", next(iter(frame)).get("d"))
    assert max(map(float, ends)) - min(map(float, ends)) > 0.5 * height


def test_the_page_shows_rows_metrics_failures_definitions_and_the_edits(page, made):
    config = made[1]
    for text in ("unedited", "tuned", "picky", "record 1 is beyond me", "greedily written"):
        assert text in page
    for text in (
        "mmedit: top-1, all positions",
        "token NLL",
        "top-5 overlap",
        "KL(before || after)",
    ):
        assert text in page
    for label in LABELS.values():
        assert label in page
    assert config.model.name in page
    record = items(1, "vlkeb")[0]
    for text in (record["src"], record["alt"], record["rephrase"], record["loc"]):
        assert text in page
    last = lines(made[0] / "editors" / "tuned" / "records.jsonl")[-1]
    after = last["probes"]["reliability"][0]["after"]
    assert f"<b>{after}</b>" in page


def test_markdown_and_json_have_the_same_numbers(made):
    text = (made[0] / "report.md").read_text(encoding="utf-8")
    found = json.loads((made[0] / "results.json").read_text(encoding="utf-8"))
    assert [(r["row"], r["count"]) for r in found["rows"]] == [
        (name, n) for n in (2, 4) for name in ("unedited", "tuned", "picky")
    ]
    macro = found["rows"][4]["metrics"]["reliability"]["token accuracy"]["macro"]
    assert f"{100 * macro['value']:.1f} [{100 * macro['low']:.1f}" in text
    assert "## What failed" in text
    assert "counts:" in text


def test_the_gallery_takes_turns_between_outcomes(made):
    folder, config = made
    records = records_of(config.data, progress=False).records
    (line, *_) = lines(folder / "editors" / "tuned" / "records.jsonl")
    scores = line["probes"]["reliability"][0]["scores"]
    name = "generated exact match"

    def outcome(number, match):
        found = [{**line["probes"]["reliability"][0], "scores": {**scores, name: [match, 1]}}]
        return line | {"record": str(number), "probes": {"reliability": found}}

    many = [outcome(i % 4, 1.0) for i in range(3)] + [outcome(3, 0.0)]
    shown = gallery(records, {"a": many, **{f"b{i}": [] for i in range(30)}}, Pictures())
    assert [item["id"] for item in shown] == ["0", "1", "3"]  # three, the odd one among them
    assert [item["blocks"][0]["cells"][0]["frame"] for item in shown] == ["right", "right", "wrong"]


def test_texts_of_the_data_are_escaped(tmp_path, mllm):
    some = items(1)
    some[0]["src"] = "<script>w5</script> w9"
    data = setup(tmp_path, found=some)
    run(tmp_path, config_of(tmp_path, data, {"nothing": {"editor": "nudge"}}), mllm=mllm)
    text = (tmp_path / "runs" / "run" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;w5" in text


def test_the_command_prints_the_table_and_says_what_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("editing.evaluation.running.mllm_of", lambda options: tiny("llava"))
    config_of(tmp_path, setup(tmp_path, 2, "evqa"), EDITORS)
    command = ["edit", str(tmp_path / "edit.yaml"), "--runs", str(tmp_path / "runs")]
    assert cli.main([*command, "data.limit=1"]) == 0
    out = capsys.readouterr().out
    for text in ("unedited", "tuned", "image locality", "report:", "paired difference"):
        assert text in out
    assert cli.main(command) == 2  # another limit in the same folder
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite"]) == 1
    assert "record 1: ValueError: record 1 is beyond me" in capsys.readouterr().out


def test_stand_ins_run_without_the_images_and_are_told(tmp_path, mllm):
    data = setup(tmp_path, 2, "vlkeb")
    config = config_of(tmp_path, data, {"nothing": {"editor": "nudge"}})
    (tmp_path / "any").mkdir()
    picture(3).save(tmp_path / "any" / "one.png")
    tried = limited(config, images=str(tmp_path / "nowhere"), stand_ins=str(tmp_path / "any"))
    report = run(tmp_path, tried, mllm=mllm)
    assert report.notes[0].startswith("STAND-IN IMAGES: 2 of 2 records")
    root = tmp_path / "runs" / "run"
    for name in ("report.html", "report.md", "results.json"):
        assert "STAND-IN IMAGES" in (root / name).read_text(encoding="utf-8")
    images = {x["image"] for x in lines(root / "base.jsonl")}
    assert images == {one["image"] for one in items(2, "vlkeb")}
