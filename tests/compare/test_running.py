"""Whole comparisons on the fake task: what is kept, what is rerun, and what a failure leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from mmtune.compare.config import cells, load_comparison
from mmtune.compare.running import compare, search
from mmtune.config import to_yaml
from mmtune.runs import RunError
from tests.compare import small
from tests.compare.small import BROKEN, CONFIG, EVALUATED, KILL, SEARCH
from tests.report.browser import looks_right

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = "adapter/adapter_model.safetensors"
CELLS = ("narrow-seed0", "narrow-seed1", "wide-seed0", "wide-seed1")


def run(config, tmp_path, do=compare, name="runs", **settings):
    told = []
    found = do(
        load_comparison(config), tmp_path / name, told.append, setup=small.install, **settings
    )
    return found, told


def script(config, runs, **environment):
    command = [sys.executable, "-m", "tests.compare.small", str(config), str(runs)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        command, capture_output=True, text=True, env=settings, cwd=ROOT, check=False
    )


def results(tmp_path, name="runs"):
    lines = (tmp_path / name / "small/results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def stamps(folder):
    return {p: p.stat().st_mtime_ns for p in sorted(folder.glob("cells/*/results.json"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed comparison to compare others with, and what its processes evaluated."""
    folder = tmp_path_factory.mktemp("whole")
    config = folder / "small.yaml"
    config.write_text(CONFIG)
    log = folder / "evaluated.txt"
    done = script(config, folder / "runs", **{EVALUATED: str(log)})
    assert done.returncode == 0, done.stderr
    return folder


def test_every_cell_is_an_ordinary_run_with_its_numbers(whole):
    from safetensors.torch import load_file

    found = results(whole)
    assert [Path(line["folder"]).name for line in found] == list(CELLS)
    for line in found:
        folder = whole / "runs/small" / line["folder"]
        rank = 1 if line["method"] == "narrow" else 4
        assert line["status"] == "done"
        assert line["trainable"] == rank * (6 + 16) * 2
        assert line["steps"] == 2 * 24 // 4
        assert line["adapter_bytes"] == (folder / ADAPTER).stat().st_size
        assert sum(t.numel() for t in load_file(folder / ADAPTER).values()) == line["trainable"]
        assert line["merges"] is True
        assert line["forward_ratio"] > 0
        assert 0 < line["step_seconds"] * line["steps"] < line["seconds"]
        written = json.loads((folder / "results.json").read_text())
        assert line["metrics"]["fit"] == written["after"]["fit"]["value"]
        gain = written["after"]["fit"]["value"] - written["before"]["fit"]["value"]
        assert written["difference"]["fit"]["value"] == gain > 0
        assert (folder / "report.html").exists()


def test_the_base_is_evaluated_once_and_never_by_a_cell(whole):
    seen = (whole / "evaluated.txt").read_text().splitlines()
    assert seen.count("Sequential test") == 1
    assert seen.count("PeftModel test") == len(CELLS)
    assert len(seen) == 1 + len(CELLS)


@pytest.mark.parametrize(("kill", "done"), [("1:7", CELLS[:1]), ("wide-seed0", CELLS[:3])])
def test_killed_comparison_goes_on_and_ends_bit_identical(whole, tmp_path, kill, done, write):
    """Killed in the middle of a cell, and between two cells."""
    config = write(CONFIG)
    killed = script(config, tmp_path / "runs", **{KILL: kill})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    root = tmp_path / "runs/small"
    before = stamps(root)
    assert sorted(p.parent.name for p in before) == sorted(done)
    if kill == "1:7":  # steps 1 to 4 are in a checkpoint
        assert (root / "cells/narrow-seed1/checkpoints/checkpoint-4").is_dir()
    _, told = run(config, tmp_path)
    assert f"{len(done)} of 4 cells are done" in told
    after = stamps(root)
    assert {p: after[p] for p in before} == before
    for cell in CELLS:
        for file in (ADAPTER, "metrics.jsonl"):
            mine, theirs = root / "cells" / cell / file, whole / "runs/small/cells" / cell / file
            assert mine.read_bytes() == theirs.read_bytes(), (cell, file)
    values = [line["metrics"] for line in results(tmp_path)]
    assert values == [line["metrics"] for line in results(whole)]


def test_cells_that_only_began_are_trained_from_their_start(write, tmp_path):
    """Killed before the config of one cell was whole, and before the first checkpoint of one."""
    config = write(CONFIG.replace("seeds: [0, 1]", "seeds: [0]"))
    root = tmp_path / "runs/small"
    first, second = (cell.config for cell in cells(load_comparison(config)))
    (root / "cells/narrow-seed0").mkdir(parents=True)
    (root / "cells/narrow-seed0/.config.yaml.x7").write_text(to_yaml(first)[:20])
    (root / "cells/wide-seed0").mkdir(parents=True)
    (root / "cells/wide-seed0/config.yaml").write_text(to_yaml(second))
    (root / "compare.yaml").write_text("")
    _, told = run(config, tmp_path)
    assert "0 of 2 cells are done" in told
    assert not any("changed" in text for text in told)
    assert [(line["status"], line["steps"]) for line in results(tmp_path)] == [("done", 12)] * 2


def test_finished_comparison_trains_nothing_and_a_changed_cell_is_trained_again(write, tmp_path):
    run(write(CONFIG), tmp_path)
    root = tmp_path / "runs/small"
    first = stamps(root)
    _, told = run(write(CONFIG), tmp_path)
    assert told == ["4 of 4 cells are done"]
    assert stamps(root) == first
    _, told = run(write(CONFIG.replace("rank: 4", "rank: 3")), tmp_path)
    assert "2 of 4 cells are done" in told
    changed = [text for text in told if "its config changed" in text]
    assert [text.partition(":")[0] for text in changed] == ["wide-seed0", "wide-seed1"]
    assert all("(rank: 4 -> rank: 3)" in text for text in changed)
    second = stamps(root)
    kept = {p for p in first if p.parent.name.startswith("narrow")}
    assert {p for p in first if first[p] == second[p]} == kept
    assert [line["trainable"] for line in results(tmp_path)] == [44, 44, 132, 132]
    _, told = run(write(CONFIG.replace("rank: 4", "rank: 3")), tmp_path, overwrite=True)
    third = stamps(root)
    assert all(third[p] != second[p] for p in second)


def test_in_one_process_the_cells_end_bit_identical(whole, tmp_path, monkeypatch):
    install = partial(small.install, monkeypatch.setattr)
    config = load_comparison(whole / "small.yaml")
    assert not compare(config, tmp_path / "runs", setup=install, apart=False).failed
    for cell in CELLS:
        one, other = (
            r / "small/cells" / cell / ADAPTER for r in (whole / "runs", tmp_path / "runs")
        )
        assert one.read_bytes() == other.read_bytes()


def test_failing_method_is_shown_and_the_others_go_on(write, tmp_path):
    text = CONFIG.replace("seeds: [0, 1]", "seeds: [0]").replace(
        "methods:\n", f"methods:\n{BROKEN}"
    )
    table, told = run(write(text), tmp_path)
    assert [(row.method, row.status) for row in table.rows()] == [
        ("broken", "0 of 1 seeds"), ("narrow", "done"), ("wide", "done"),
    ]  # fmt: skip
    assert [o.cell.folder for o in table.failed] == ["cells/broken-seed0"]
    root = tmp_path / "runs/small"
    error = (root / "cells/broken-seed0/error.txt").read_text()
    assert error.startswith("ValueError: no place for it\n")
    assert "Traceback" in error
    assert "in broken" in error
    page = (root / "compare.html").read_text()
    for shown in (page, (root / "compare.md").read_text(), "\n".join(told)):
        assert "ValueError: no place for it" in shown
    assert "and a second line" not in page
    looks_right(root / "compare.html", tmp_path)
    _, told = run(write(text), tmp_path)  # only what failed is tried again
    assert "2 of 3 cells are done" in told


def test_search_chooses_on_val_and_never_looks_at_test(write, tmp_path):
    config = write(CONFIG + SEARCH)
    found, _ = run(config, tmp_path, search)
    again, told = run(config, tmp_path, search)
    assert told == ["12 of 12 cells are done"]
    assert again == found
    configs = list((tmp_path / "runs/small/search").glob("*/config.yaml"))
    assert len(configs) == 12
    assert all("test: null" in path.read_text() for path in configs)
    root = tmp_path / "runs/small/search"
    for choice in found:
        means = {}
        for rate in (1e-3, 1e-2, 1e-1):
            files = [root / f"{choice.method}-lr{rate}-seed{s}/results.json" for s in (0, 1)]
            read = [json.loads(file.read_text()) for file in files]
            assert {(r["split"], r["steps"]) for r in read} == {("val", 12)}
            means[rate] = sum(r["after"]["fit"]["value"] for r in read) / 2
        assert choice.best == max(means, key=means.__getitem__)
        assert {r: m.value for r, m in choice.tried.items()} == pytest.approx(means)
    rates = {c.method: c.best for c in found}
    written = [json.loads(x) for x in (root.parent / "search.jsonl").read_text().splitlines()]
    assert {line["method"]: line["best"] for line in written} == rates
    table, _ = run(config, tmp_path)
    assert {c.method: c.best for c in table.choices} == rates
    assert "Search for the learning rate" in (root.parent / "compare.md").read_text()


def test_search_by_an_error_takes_the_lowest(write, tmp_path):
    config = write(CONFIG + SEARCH.replace("seeds: [0, 1]", "seeds: [0], metric: error MnR"))
    by_error, _ = run(config, tmp_path, search)
    for choice in by_error:
        values = {rate: mean.value for rate, mean in choice.tried.items() if mean}
        assert choice.best == min(values, key=values.__getitem__)


def test_foreign_folder_is_left_alone_and_an_unknown_metric_is_named(write, tmp_path):
    other = tmp_path / "runs/small"
    other.mkdir(parents=True)
    (other / "results.json").write_text("{}")
    with pytest.raises(RunError, match="holds no comparison"):
        run(write(CONFIG), tmp_path)
    assert [p.name for p in other.iterdir()] == ["results.json"]
    with pytest.raises(RunError, match=r"no metric 'fitt'; the task has fit.*Did you mean 'fit'"):
        run(write(CONFIG + "metrics: [fitt]\n"), tmp_path, name="elsewhere")
    assert not (tmp_path / "elsewhere/small/cells").exists()
