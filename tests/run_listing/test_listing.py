"""Runs of every kind are read from what their commands write; broken ones are named."""

from __future__ import annotations

import json
import shutil

import pytest

from mmtune.cli import main
from mmtune.metrics.seeds import over_seeds
from mmtune.run_listing.comparing import differences
from mmtune.run_listing.listing import READERS, listing, named
from mmtune.run_listing.page import COLOURS, overlaid, write_page
from tests.report.browser import looks_right
from tests.run_listing.made import make

NAMES = {
    "narrow-seed0": "train",
    "wide-seed0": "train",
    "small": "compare",
    "edits": "edit",
    "learned": "edit-train",
    "records": "build",
    "asked": "probe",
    "bench/tiny-cpu": "bench",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def runs(whole, tmp_path):
    """A copy that a test may break."""
    shutil.copytree(whole, tmp_path / "runs", copy_function=shutil.copy2)
    return tmp_path / "runs"


def by_name(root):
    return {run.name: run for run in listing(root).runs}


def read(path):
    return json.loads(path.read_text())


def test_every_kind_is_read_and_finished(whole):
    found = by_name(whole)
    assert {name: run.kind for name, run in found.items()} == NAMES
    assert {run.kind for run in found.values()} == {reader.kind for reader in READERS}
    for name, run in found.items():
        assert run.state == "finished", (name, run.why)
        assert run.headline is not None, name
        assert run.report is not None or name == "bench", name
        assert run.report.is_file()
        assert run.started.startswith("20"), name


def test_training_quotes_the_primary_metric_with_its_interval(whole):
    run, results = by_name(whole)["wide-seed0"], read(whole / "wide-seed0/results.json")
    assert results["primary"] == "fit"
    stored = results["after"]["fit"]
    assert (run.headline.what, run.headline.value) == ("fit", stored["value"])
    assert (run.headline.low, run.headline.high) == (stored["low"], stored["high"])
    assert run.numbers[1].value == results["difference"]["fit"]["value"]
    assert run.trainable == 4 * (6 + 16) * 2
    assert run.seconds == results["seconds"]
    assert [step for step, _ in run.curve] == list(range(1, 13))


def test_older_results_quote_their_first_metric(runs):
    path = runs / "wide-seed0/results.json"
    results = read(path)
    del results["primary"]
    path.write_text(json.dumps(results))
    assert by_name(runs)["wide-seed0"].headline.what == "fit"


def test_a_comparison_quotes_its_best_method_over_seeds(whole):
    run = by_name(whole)["small"]
    cells = [json.loads(x) for x in (whole / "small/results.jsonl").read_text().splitlines()]
    means = {
        method: over_seeds([c["metrics"]["fit"] for c in cells if c["method"] == method])
        for method in ("narrow", "wide")
    }
    best = max(means, key=lambda method: means[method].value)
    assert run.headline.name == f"{best}: fit"
    assert run.headline.value == means[best].value
    assert run.headline.high - run.headline.value == pytest.approx(means[best].half)
    assert run.trainable == {"narrow": 1, "wide": 4}[best] * (6 + 16) * 2


def test_an_evaluation_quotes_its_most_reliable_editor_in_percent(whole):
    run, results = by_name(whole)["edits"], read(whole / "edits/results.json")
    shares = {
        row["row"]: row["metrics"]["reliability"]["generated exact match"]["macro"]
        for row in results["rows"]
    }
    assert shares["tuned"]["value"] > shares["still"]["value"]
    assert run.headline.name == "tuned: reliability"
    assert run.headline.value == 100 * shares["tuned"]["value"]
    assert run.headline.low == 100 * shares["tuned"]["low"]
    assert not any(number.of == "unedited" for number in run.numbers)
    assert run.why == "failed records: 1"


def test_a_trained_editor_quotes_its_success(whole):
    run, results = by_name(whole)["learned"], read(whole / "learned/results.json")
    assert run.headline.value == 100 * results["validation"]["success"]
    assert run.trainable == results["parameters"]


def test_a_build_counts_its_records(whole):
    run = by_name(whole)["records"]
    records = read(whole / "records/data/train.json")
    assert (run.headline.what, run.headline.value) == ("records", len(records))
    kept = {number.of: number.value for number in run.numbers if number.what == "kept"}
    assert kept["collect"] == 13
    assert kept["locality"] == len(records)


def test_a_probe_quotes_accuracy_over_images(whole):
    run = by_name(whole)["asked"]
    assert run.headline.name == "told: simple accuracy"
    assert run.headline.value == 75  # "yes" is right for six of eight
    assert run.headline.low < 75 < run.headline.high


def test_a_probe_whose_items_are_gone_has_no_interval(runs, monkeypatch):
    config = runs / "asked/config.yaml"
    config.write_text(config.read_text().replace("small.jsonl", "gone.jsonl"))
    headline = by_name(runs)["asked"].headline
    assert (headline.value, headline.low) == (75, None)


def test_a_bench_quotes_the_first_method_that_trains(whole):
    run = by_name(whole)["bench/tiny-cpu"]
    assert str(run.headline) == "3.5 [2.0, 4.0] ms"
    assert (run.headline.of, run.trainable) == ("aurora", 70)
    assert run.why == "not measured: qlora"


# What is removed from a finished run -> its state, and part of why.
HALVES = {
    "wide-seed0": (["results.json"], "unfinished", "step 12 is logged; the same command with --re"),
    "narrow-seed0": (["results.json", "metrics.jsonl"], "unfinished", "no step is logged"),
    "edits": (["results.json"], "unfinished", "records scored: still 3, tuned 3"),
    "learned": (["results.json"], "unfinished", "--resume"),
    "asked": (["report.html"], "unfinished", "16 replies; the same command goes on"),
    "bench": (["tiny-cpu.json"], "unfinished", "3 contestants are measured"),
    "records": (["data"], "unfinished", "collect, select"),
}


@pytest.mark.parametrize("name", HALVES)
def test_what_was_stopped_is_unfinished_and_says_how_it_goes_on(runs, name):
    files, state, why = HALVES[name]
    for path in (runs / name / file for file in files):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run = next(run for run in listing(runs).runs if run.name.startswith(name))
    assert run.state == state
    assert why in run.why
    assert len(listing(runs).runs) == len(NAMES)


def test_cells_that_failed_or_are_missing_leave_a_comparison_unfinished(runs):
    file = runs / "small/results.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0] |= {"status": "failed", "error": "out of memory", "metrics": {}}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    run = by_name(runs)["small"]
    assert run.state == "unfinished"
    assert run.why.startswith("2 of 4 cells are done, 1 failed (narrow-seed0: out of memory)")


def test_a_line_that_was_not_finished_is_left_out(runs):
    file = runs / "wide-seed0/metrics.jsonl"
    with file.open("a") as log:
        log.write('{"step": 13, "lo')
    assert by_name(runs)["wide-seed0"].curve[-1][0] == 12


DAMAGE = {
    "wide-seed0/results.json": ("{", "results.json cannot be read"),
    "narrow-seed0/metrics.jsonl": ("{]\n", "metrics.jsonl line 1 is no JSON"),
    "edits/results.json": ('{"rows": [{}]}', "KeyError"),
    "learned/config.yaml": ("a: [", "config.yaml cannot be read"),
    "small/compare.yaml": ("[]", "compare.yaml holds no mapping"),
    "records/stages/01-collect/manifest.json": ('{"stage": 1}', "KeyError"),
    "asked/replies.jsonl": ("5\n", "replies.jsonl line 1 holds no JSON object"),
    "bench/tiny-cpu.json": ("", "tiny-cpu.json cannot be read"),
    "records/manifest.json": ("\0", "manifest.json cannot be read"),
    "asked/config.yaml": ("other: 1", "config.yaml is of no command"),
}


@pytest.mark.parametrize("file", DAMAGE)
def test_a_damaged_file_is_named_and_the_other_runs_are_listed(runs, file):
    text, why = DAMAGE[file]
    (runs / file).write_text(text)
    found = listing(runs).runs
    broken = [run for run in found if run.state == "broken"]
    assert len(found) == len(NAMES)
    assert [run.name for run in broken] == [file.partition("/")[0]]
    assert why in broken[0].why


@pytest.mark.parametrize(("name", "part"), [("wide-seed0", "adapter"), ("learned", "trained")])
def test_a_finished_run_without_its_weights_is_broken(runs, name, part):
    shutil.rmtree(runs / name / part)
    run = by_name(runs)[name]
    assert (run.state, run.kind) == ("broken", NAMES[name])
    assert f"{part}/ is missing" in run.why


def test_other_folders_are_named_apart(runs):
    for name in ("empty", ".hidden", ".adapter.partial-x1"):
        (runs / name).mkdir()
    found = listing(runs)
    assert set(found.others) == {"empty", ".hidden"}
    half = next(run for run in found.runs if run.name == ".adapter.partial-x1")
    assert "half-written" in half.why


def test_only_what_differs_in_the_configs_is_shown_with_dotted_keys(whole):
    pair = named(["narrow-seed0", str(whole / "wide-seed0")], whole)
    assert differences(pair) == {"tuner.rank": [1, 4], "training.lr": [0.01, 0.02]}
    assert differences(pair[:1] * 2) == {}


def test_runs_that_cannot_be_compared_are_refused(runs, capsys):
    (runs / "small/compare.yaml").write_text("[]")
    for names, text in (
        (["edits", "asked"], "runs of one kind can be compared, got edits (edit), asked (probe)"),
        (["edit"], "no run 'edit' in"),
        (["edit"], "Did you mean 'edits'?"),
        (["small"], "small is broken: compare.yaml holds no mapping"),
    ):
        assert main(["runs", *names, "--runs", str(runs)]) == 2
        assert text in capsys.readouterr().err
    assert main(["runs", "--runs", str(runs / "nowhere")]) == 2


def test_the_command_lists_and_compares(whole, capsys):
    assert main(["runs", "--runs", str(whole)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in NAMES)
    assert "finished: bench/tiny-cpu: not measured: qlora" in out
    assert main(["runs", "narrow-seed0", "wide-seed0", "--runs", str(whole)]) == 0
    out = capsys.readouterr().out
    assert "tuner.rank" in out
    assert "fit, change" in out


def test_json_holds_what_the_tables_say(whole, capsys):
    assert main(["runs", "--json", "--runs", str(whole)]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    assert {run["name"]: run["kind"] for run in found} == NAMES
    assert main(["runs", "narrow-seed0", "wide-seed0", "--json", "--runs", str(whole)]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["differences"]["tuner.rank"] == {"narrow-seed0": 1, "wide-seed0": 4}


def test_the_page_looks_right_with_broken_runs_among_others(runs, tmp_path, capsys):
    (runs / "asked/replies.jsonl").write_text("{\n")
    assert main(["runs", "--plot", "--runs", str(runs)]) == 0
    page = runs / "runs.html"
    assert f"page: {page}" in capsys.readouterr().out
    text = page.read_text()
    assert 'href="edits/report.html"' in text
    assert "replies.jsonl line 1 is no JSON" in text
    assert text.count("<svg") == 6 + 2  # bars of six kinds; losses of two objectives
    looks_right(page, tmp_path)


def test_the_page_of_a_comparison_shows_differences_and_numbers(runs, tmp_path):
    page = write_page(named(["narrow-seed0", "wide-seed0"], runs), runs, compared=True)
    text = page.read_text()
    assert "tuner.rank" in text
    assert "fit, change" in text
    looks_right(page, tmp_path)


def test_losses_of_several_runs_are_lines_that_can_be_told_apart():
    picture = overlaid("both", [("a", [(1, 2.0), (2, 1.0)]), ("_b", [(1, 3.0), (2, 1.5)])])
    assert COLOURS[0] in picture
    assert COLOURS[1] in picture
    assert ">a<" in picture
    assert "_b<" in picture
