"""Rows, texts, notes and the page of a comparison, from made-up outcomes."""

from __future__ import annotations

import dataclasses
import math

import pytest

from mmtune.compare.base import Base
from mmtune.compare.cells import Outcome
from mmtune.compare.choosing import as_yaml, choices
from mmtune.compare.config import cells, load_comparison, search_cells
from mmtune.compare.page import render_page
from mmtune.compare.table import Table, record, render_markdown
from tests.compare.small import CONFIG, SEARCH
from tests.report.test_report import Page

BASE = Base({"fit": {"value": 10.0, "low": 9.0, "high": 11.0, "n": 40}}, "fit", {"device": "CPU"})
T2 = 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025))  # Student's 97.5 % quantile, two degrees


def done(cell, fit, step=0.25, memory=2**30, ratio=1.25, merges=True, trainable=1000):
    results = {
        "after": {"fit": {"value": fit, "low": fit, "high": fit, "n": 40}},
        "trainable": trainable,
        "total": 100_000,
        "share_percent": trainable / 1000,
        "steps": 12,
        "seconds": 5.0,
        "step_seconds": step,
        "peak_memory": memory,
        "memory_kind": "process RSS",
    }
    measured = {"adapter_bytes": 2048, "forward_ratio": ratio, "merges": merges}
    return Outcome(cell, "done", "", results, measured)


@pytest.fixture
def config(write):
    return load_comparison(write(CONFIG.replace("[0, 1]", "[0, 1, 2]") + SEARCH))


@pytest.fixture
def table(config):
    narrow = zip((20.0, 23.0, 26.0), (0.2, 0.4, None), (1, 3, 2), (1.5, 1.0, 1.2), strict=True)
    made = iter(narrow)
    outcomes = []
    for cell in cells(config):
        if cell.method == "narrow":
            fit, step, memory, ratio = next(made)
            outcomes.append(done(cell, fit, step, memory * 2**30, ratio))
        elif cell.seed == 0:
            outcomes.append(done(cell, 40.0, merges=False, trainable=50_000))
        elif cell.seed == 1:
            outcomes.append(Outcome(cell, "failed", "ValueError: <b>no|place</b>"))
        else:
            outcomes.append(Outcome(cell, "not run"))
    return Table(config, BASE, outcomes, [])


def test_rows_are_over_the_finished_seeds(table):
    narrow, wide = table.rows()
    assert narrow.quality["fit"].value == 23.0
    assert narrow.quality["fit"].half == pytest.approx(T2 * 3 / math.sqrt(3), rel=1e-12)
    assert narrow.step_seconds == pytest.approx(0.3)
    assert (narrow.peak_memory, narrow.forward_ratio, narrow.merges) == (3 * 2**30, 1.2, True)
    assert (narrow.status, narrow.error) == ("done", "")
    assert (wide.quality["fit"].value, wide.quality["fit"].half) == (40.0, None)
    assert (wide.status, wide.error) == ("1 of 3 seeds", "ValueError: <b>no|place</b>")


def test_table_as_text_has_the_base_first(table):
    assert table.header() == [
        "method", "fit", "trainable", "share", "step", "peak memory (process RSS)",
        "adapter file", "forward", "merges", "status",
    ]  # fmt: skip
    base, narrow, wide = table.lines()
    assert base == ["base", "10.0", "0", "0 %", "–", "–", "–", "1.00 ×", "–", "not tuned"]
    assert narrow == [
        "narrow", "23.0 ± 7.5", "1,000", "1.00 %", "300 ms", "3.00 GiB", "2 KiB", "1.20 ×", "yes",
        "done",
    ]  # fmt: skip
    assert wide[1:3] == ["40.0", "50,000"]
    assert wide[-2:] == ["no", "1 of 3 seeds; ValueError: <b>no|place</b>"]
    assert table.lines(errors=False)[2][-1] == "1 of 3 seeds"


def test_notes_say_what_was_measured_and_what_is_missing(table):
    text = "\n".join(table.notes())
    for part in (
        "Model fake (float32), task small, test split of 40 queries; seeds 0, 1, 2; "
        "12 steps of batch 4 for each method.",
        "no search was run): narrow 0.01, wide 0.02.",
        "Without a result: wide-seed1 (failed), wide-seed2 (not run).",
    ):
        assert part in text, part


def test_markdown_keeps_its_columns_whatever_an_error_says(table):
    lines = [x for x in render_markdown(table).splitlines() if x.startswith("|")]
    assert len(lines) == 2 + 3
    assert {x.replace(r"\|", "").count("|") for x in lines} == {len(table.header()) + 1}


def test_records_hold_what_is_known_and_nothing_else(table):
    first, failed = record(table.outcomes[0]), record(table.outcomes[4])
    assert (first["metrics"], first["trainable"], first["lr"]) == ({"fit": 20.0}, 1000, 0.01)
    assert (failed["status"], failed["metrics"], failed["trainable"]) == ("failed", {}, None)
    assert failed["error"] == "ValueError: <b>no|place</b>"


def test_page_is_whole_and_escapes_errors(table, tmp_path):
    for outcome in table.outcomes:
        folder = tmp_path / outcome.cell.folder
        folder.mkdir(parents=True)
        lines = [f'{{"step": {s}, "loss": {1 / s}}}\n' for s in (1, 2, 3)]
        (folder / "metrics.jsonl").write_text("".join(lines))
    text = render_page(table, tmp_path)
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert "<b>no|place</b>" not in text
    assert text.count("&lt;b&gt;no|place&lt;/b&gt;") == 1
    assert text.count("<svg") == 1 + 2  # the scatter plot, and the losses of two methods
    assert "23.0 ± 7.5" in text


def test_page_without_any_result_is_whole(table, tmp_path):
    none = [Outcome(o.cell, "failed", "broken") for o in table.outcomes]
    text = render_page(dataclasses.replace(table, outcomes=none), tmp_path)
    assert Page(text).open == []
    assert "<svg" not in text


def test_choice_needs_every_seed_of_a_rate_and_ties_go_to_the_lower(config):
    values = {  # rate -> the two seeds of a method
        "narrow": {1e-3: (30, 10), 1e-2: (20, 20), 1e-1: (19, 20)},
        "wide": {1e-3: (1, 2), 1e-2: (3, 4), 1e-1: (90, None)},
    }
    outcomes = []
    for cell in search_cells(config):
        fit = values[cell.method][cell.config.training.lr][cell.seed]
        outcomes.append(
            Outcome(cell, "failed", "nan in step 3") if fit is None else done(cell, fit)
        )
    narrow, wide = choices(config, "fit", outcomes)
    assert (narrow.best, narrow.at_edge) == (1e-3, True)
    assert (wide.best, wide.at_edge) == (1e-2, False)
    assert (wide.tried[1e-1], wide.errors) == (None, {1e-1: "nan in step 3"})
    assert as_yaml([narrow, wide]).splitlines() == [
        "methods:", "  narrow:", "    training: {lr: 0.001}", "  wide:", "    training: {lr: 0.01}",
    ]  # fmt: skip


def test_lines_to_paste_give_the_chosen_rates(config, tmp_path):
    import yaml

    outcomes = [done(cell, cell.config.training.lr) for cell in search_cells(config)]
    pasted = yaml.safe_load(as_yaml(choices(config, "fit", outcomes)))
    assert pasted["methods"]["wide"]["training"]["lr"] == 1e-1
    notes = "\n".join(Table(config, BASE, outcomes, choices(config, "fit", outcomes)).notes())
    assert "each method tried 3 on the val split. Not what the search chose: narrow, wide." in notes
    assert "The search chose the lowest or highest rate tried for narrow, wide." in notes
