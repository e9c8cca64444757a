"""Averages that can be computed by hand."""

from __future__ import annotations

import json

import pytest

from editing.config import EditConfig, EditDataOptions, EditModelOptions, EditorRow, ProtocolOptions
from editing.evaluation.summary import summed_up
from editing.evaluation.tables import cell, columns, failure_lines, footnotes, header, table_lines
from editing.methods.finetune import FineTuneOptions
from editing.requests import EditRecord, EditRequest, Probe
from mmtune.data.records import ImageFile

MATCH, TOKENS, AGREE = "generated exact match", "token accuracy", "argmax agreement"


def records():
    """Three records, the first two about one image."""
    names = ("a.png", "a.png", "b.png")
    made = []
    for number, name in enumerate(names):
        image = ImageFile("root", name)
        request = EditRequest("q", "t", image, str(number))
        away = Probe("l", "x")
        made.append(
            EditRecord(request, text_locality=(away,), id=str(number), where=f"f, {number}")
        )
    return made


def line(record, match, tokens, agree=None, **more):
    found = {"reliability": [{"scores": {MATCH: [match, 1], TOKENS: tokens}}]}
    if agree:
        found["text_locality"] = [{"scores": {AGREE: agree, "KL(before || after)": [0.5, 2]}}]
    return {"record": str(record), "where": f"f, {record}", "count": 1, "probes": found} | more


def config(kind="single", **protocol):
    return EditConfig(
        "run",
        0,
        EditModelOptions("m"),
        EditDataOptions("p"),
        ProtocolOptions(kind, **protocol),
        {"ft": EditorRow("ft", FineTuneOptions())},
    )


def report():
    base = [line(0, 0, [1, 4], [2, 2]), line(1, 0, [0, 2], [2, 2]), line(2, 1, [1, 1], [2, 2])]
    rows = [
        line(0, 1, [4, 4], [1, 2], seconds=2.0),
        line(1, 1, [1, 2], [2, 2], seconds=4.0),
        {"record": "2", "where": "f, 2", "count": 1, "error": "ValueError: no", "seconds": 9.0},
    ]
    return summed_up(config(), records(), {x["record"]: x for x in base}, {"ft": rows})


def test_means_are_over_records_and_differences_over_those_that_both_have():
    unedited, ft = report().rows
    assert unedited.metrics["reliability", MATCH].macro.value == pytest.approx(1 / 3)
    tokens = unedited.metrics["reliability", TOKENS]
    assert tokens.macro.value == pytest.approx((1 / 4 + 0 + 1) / 3)
    assert tokens.micro.value == pytest.approx(2 / 7)
    assert (tokens.n, tokens.images) == (3, 2)
    own = ft.metrics["reliability", TOKENS]
    assert (own.macro.value, own.n, own.missing, own.images) == (0.75, 2, 1, 1)
    assert ft.gains["reliability", TOKENS].macro.value == pytest.approx(0.75 - 0.125)
    assert ft.gains["reliability", MATCH].macro.value == 1
    assert ft.metrics["text_locality", AGREE].macro.value == 0.75
    assert ("text_locality", AGREE) not in ft.gains
    assert (ft.seconds, ft.records, ft.scored) == (4.0, 3, 2)


def test_intervals_are_over_images():
    unedited = report().rows[0]
    found = unedited.metrics["reliability", MATCH].macro
    # Two images: drawn are a a, a b or b b, whose records average 0, 1/3 and 1.
    assert (found.low, found.high) == (0, 1)


def test_failures_are_counted_named_and_noted():
    found = report()
    assert failure_lines(found) == ["failed: ft: f, 2: ValueError: no"]
    assert "ft: 1 of 3 records failed and are in none of its means" in found.notes
    assert table_lines(found)[1].facts == ["2", "4", "1"]


def test_columns_are_those_that_were_measured_and_their_definitions_are_named():
    found = report()
    assert list(columns(found)) == ["reliability", "token accuracy", "text locality"]
    assert header(found) == [
        "editor", "reliability", "token accuracy", "text locality", "n", "s/edit", "failed",
    ]  # fmt: skip
    text = "\n".join(footnotes(found))
    for name in (MATCH, TOKENS, AGREE, "bootstrap", "over 2 images"):
        assert name in text


def test_cells_hold_percent_interval_and_difference():
    found = report()
    unedited, ft = (cell(row, ("reliability", MATCH)) for row in found.rows)
    assert str(unedited) == "33.3 [0.0, 100.0]"
    assert str(ft) == "100.0 +100.0"  # one image tells no spread, and no sign
    assert ft.sign == 0
    assert cell(found.rows[1], ("portability", MATCH)).value == ""


def test_results_are_json_with_definitions():
    found = json.loads(json.dumps(report().as_json(), allow_nan=False))
    ft = found["rows"][1]
    assert ft["metrics"]["reliability"][MATCH]["macro"]["value"] == 1
    assert ft["metrics"]["reliability"][MATCH]["difference"]["macro"]["value"] == 1
    assert ft["failed"] == [{"record": "2", "where": "f, 2", "error": "ValueError: no"}]
    assert "greedily" in found["definitions"][MATCH]["meaning"]


def test_an_editor_that_failed_everywhere_has_a_row_without_numbers():
    base = {str(i): line(i, 0, [1, 2]) for i in range(3)}
    bad = [
        {"record": str(i), "where": "f", "count": 1, "error": "ValueError: no"} for i in range(3)
    ]
    found = summed_up(config(), records(), base, {"ft": bad})
    assert found.rows[1].metrics == {}
    assert found.rows[1].seconds is None
    assert table_lines(found)[1].facts == ["0", "", "3"]


def test_each_count_has_a_baseline_on_the_same_records():
    base = {str(i): line(i, i > 0, [1, 2]) for i in range(3)}
    rows = [line(i, 1, [1, 2], count=n) for n in (1, 3) for i in range(n)]
    rows = [x | {"count": n} for x, n in zip(rows, (1, 3, 3, 3), strict=True)]
    found = summed_up(config("sequential", counts=[3, 1]), records(), base, {"ft": rows})
    assert [(r.name, r.count, r.records) for r in found.rows] == [
        ("unedited", 1, 1), ("ft", 1, 1), ("unedited", 3, 3), ("ft", 3, 3),
    ]  # fmt: skip
    values = [r.metrics["reliability", MATCH].macro.value for r in found.rows]
    assert values == [0, 1, pytest.approx(2 / 3), 1]
