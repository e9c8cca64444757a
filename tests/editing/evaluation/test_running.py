"""Runs on disk: three protocols, what stops them, and how they go on."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch

from editing.edits import load
from editing.evaluation import protocols
from editing.evaluation.journal import Journal
from editing.evaluation.outcomes import KINDS
from editing.meta.base import TrainedError
from editing.metrics import aggregate
from mmtune.backbones.base import SiteError
from mmtune.data.records import DataError
from mmtune.runs import RunError
from tests.editing.evaluation.runs import (
    config_of,
    items,
    limited,
    lines,
    run,
    setup,
)
from tests.editing.tiny import bits, same_bits, tiny

NOTHING, SOME = {"editor": "nudge"}, {"editor": "nudge", "size": 3.0}
LORA = {"editor": "lora", "steps": 2, "lr": 0.05}
PROTOCOLS = {
    "single": {},
    "sequential": {"counts": [1, 2, 4], "batch_size": 2, "save_every": 3},
    "batch": {"counts": [1, 2], "batch_size": 2},
}
DONE = {"single": 5, "sequential": 7, "batch": 5 + 4}  # lines of an editor on five records


def prepared(folder, kind, editors, count=5, source="vlkeb", **more):
    data = setup(folder, count, source)
    return config_of(folder, data, editors, kind, **(PROTOCOLS[kind] | more))


def own(folder, name):
    return folder / "runs" / "run" / "editors" / name


@pytest.fixture(autouse=True)
def _few_draws_and_no_pages(monkeypatch):
    """Pages and intervals have tests of their own."""
    monkeypatch.setattr("editing.evaluation.running.write_pages", lambda *arguments: None)
    for name in ("summarize", "paired"):
        place = f"editing.evaluation.summary.{name}"
        monkeypatch.setattr(place, partial(getattr(aggregate, name), resamples=20))


@pytest.mark.parametrize("kind", PROTOCOLS)
def test_an_edit_that_changes_nothing_gives_exactly_the_numbers_of_the_baseline(
    kind, tmp_path, mllm
):
    before = bits(mllm.model)
    alike = {} if kind == "single" else {"counts": [2, 4]}  # batches composed as the baseline's
    report = run(tmp_path, prepared(tmp_path, kind, {"nothing": NOTHING}, **alike), mllm=mllm)
    assert same_bits(mllm.model, before)
    base = {x["record"]: x for x in lines(tmp_path / "runs" / "run" / "base.jsonl")}
    assert len(base) == 5
    found = lines(own(tmp_path, "nothing") / "records.jsonl")
    assert len(found) == {"single": 5, "sequential": 6, "batch": 8}[kind]
    for line in found:
        assert line["probes"] == base[line["record"]]["probes"]
    for unedited, row in zip(report.rows[::2], report.rows[1::2], strict=True):
        assert (unedited.name, row.name) == ("unedited", "nothing")
        assert (unedited.metrics, unedited.count) == (row.metrics, row.count)
        assert all(gain.macro.value == 0 for gain in row.gains.values())
        assert row.metrics["image_locality", "argmax agreement"].macro.low == 1
        assert {kind for kind, _ in row.metrics} == set(KINDS)


@pytest.mark.parametrize("source", ["evqa", "eic", "vlkeb"])
def test_published_records_of_each_kind_are_edited(source, tmp_path, mllm):
    editors = {"ft": {"editor": "ft", "lr": 0.05, "region": "language"}}
    report = run(tmp_path, prepared(tmp_path, "single", editors, 2, source), mllm=mllm)
    row = report.rows[1]
    assert (row.name, row.records, row.scored) == ("ft", 2, 2)
    assert row.metrics["reliability", "generated exact match"].macro.value == 1
    assert row.seconds > 0


def test_sequential_scores_all_records_under_all_edits(tmp_path, mllm):
    config = prepared(tmp_path, "sequential", {"lora": LORA}, save_edits=True)
    run(tmp_path, config, mllm=mllm)
    found = lines(own(tmp_path, "lora") / "records.jsonl")
    assert [(x["count"], x["record"]) for x in found] == [
        (n, str(i)) for n in (1, 2, 4) for i in range(n)
    ]
    last = found[-4:]
    assert [x["record"] for x in lines(own(tmp_path, "lora") / "edits.jsonl")] == list("0123")
    edit = load(own(tmp_path, "lora") / "edits" / "000004")
    assert [r["id"] for r in edit.about["requests"]] == list("0123")
    fresh = tiny("llava")
    from editing.loading import records_of

    asked = [r.request for r in records_of(config.data, progress=False).records[:2]]
    before, unedited = bits(fresh.model), fresh.answer(asked)
    with edit.applied(fresh):
        assert fresh.answer(asked) == [x["probes"]["reliability"][0]["after"] for x in last[:2]]
    assert same_bits(fresh.model, before)
    assert fresh.answer(asked) == unedited
    assert not (own(tmp_path, "lora") / "growing").exists()


def test_saved_edits_apply_to_a_fresh_model_and_undo(tmp_path, mllm):
    editors = {"ft": {"editor": "ft", "lr": 0.05}}
    config = prepared(tmp_path, "single", editors, 2, save_edits=True)
    run(tmp_path, config, mllm=mllm)
    from editing.loading import records_of

    fresh = tiny("llava")
    before = bits(fresh.model)
    for number, record in enumerate(records_of(config.data, progress=False).records):
        with load(own(tmp_path, "ft") / "edits" / f"{number:06d}").applied(fresh):
            assert fresh.answer([record.request]) == [record.request.target]
        assert same_bits(fresh.model, before)


def test_batches_are_one_edit_of_consecutive_records(tmp_path, mllm):
    config = prepared(tmp_path, "batch", {"lora": LORA}, save_edits=True)
    report = run(tmp_path, config, mllm=mllm)
    found = lines(own(tmp_path, "lora") / "records.jsonl")
    assert [(x["count"], x["record"]) for x in found] == [
        *((1, str(i)) for i in range(5)),
        *((2, str(i)) for i in range(4)),
    ]
    edit = load(own(tmp_path, "lora") / "edits" / "000002-000001")
    assert [r["id"] for r in edit.about["requests"]] == ["2", "3"]
    assert any("1 of 5 records fill no group of 2" in note for note in report.notes)


def test_what_an_edit_draws_follows_from_the_record_not_from_the_order(tmp_path, mllm):
    found = {}
    for name, some in {"here": items(4), "there": items(4)[::-1]}.items():
        for one in some:
            one["image_rephrase"] = "same.png"
        data = setup(tmp_path / name, found=some)
        run(tmp_path / name, config_of(tmp_path / name, data, {"some": SOME}), mllm=mllm)
        found[name] = lines(own(tmp_path / name, "some") / "records.jsonl")
    drawn = {k: [x["edit"]["drawn"] for x in v] for k, v in found.items()}
    assert drawn["here"] == drawn["there"]  # ids are numbers in the file
    assert len(set(drawn["here"])) == 4


def test_a_seed_changes_what_is_drawn(tmp_path, mllm):
    drawn = []
    for seed in (0, 1):
        config = prepared(tmp_path / str(seed), "single", {"some": SOME}, 1)
        run(tmp_path / str(seed), replace(config, seed=seed), mllm=mllm)
        (line,) = lines(own(tmp_path / str(seed), "some") / "records.jsonl")
        drawn.append(line["edit"]["drawn"])
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("kind", PROTOCOLS)
def test_a_record_that_fails_is_counted_named_and_undone(kind, tmp_path, mllm):
    editors = {"picky": SOME | {"fails": "1"}, "some": SOME}
    before = bits(mllm.model)
    report = run(tmp_path, prepared(tmp_path, kind, editors, 5), mllm=mllm)
    assert same_bits(mllm.model, before)
    found = lines(own(tmp_path, "picky") / "records.jsonl")
    assert len(found) == DONE[kind]
    failed = [(x["count"], x["record"]) for x in found if "error" in x]
    together = {"single": [(1, "1")], "sequential": [(2, "1"), (4, "1")]}
    assert failed == together.get(kind, [(1, "1"), (2, "0"), (2, "1")])
    assert all("beyond me" in x["error"] for x in found if "error" in x)
    assert {n for n, _, _ in report.failed} == {"picky"}
    assert report.failed[0][2].where.endswith("records.json, record 1")
    row = next(r for r in report.rows if r.name == "picky" and r.count == failed[0][0])
    assert (row.scored, len(row.failures)) == (row.records - 1, 1)
    if kind == "sequential":  # the edits after it are made all the same
        assert [("error" in x) for x in lines(own(tmp_path, "picky") / "edits.jsonl")] == [
            False,
            True,
            False,
            False,
        ]


def test_an_error_while_scoring_is_of_the_record_that_raised_it(tmp_path, mllm, monkeypatch):
    config = prepared(tmp_path, "batch", {"some": SOME}, 4, counts=[4], batch_size=4)
    real = protocols.edited_outcomes

    def spoilt(model, records, *rest):
        if "2" in [record.id for record in records]:
            raise RuntimeError("picture is gone")
        return real(model, records, *rest)

    monkeypatch.setattr(protocols, "edited_outcomes", spoilt)
    run(tmp_path, config, mllm=mllm)
    found = lines(own(tmp_path, "some") / "records.jsonl")
    assert ["error" in x for x in found] == [False, False, True, False]
    assert found[2]["error"] == "RuntimeError: picture is gone"


def test_what_the_unedited_model_cannot_be_asked_is_edited_by_nobody(tmp_path, mllm):
    some = items(3)
    some[1]["src"] = "w5 " * 500  # longer than the model reads
    for kind in PROTOCOLS:
        folder = tmp_path / kind
        counts = {} if kind == "single" else {"counts": [3]}
        config = config_of(folder, setup(folder, found=some), {"some": SOME}, kind, **counts)
        report = run(folder, config, mllm=mllm)
        found = lines(own(folder, "some") / "records.jsonl")
        assert [x["record"] for x in found if "error" in x] == ["1"]
        assert "the unedited model could not be asked: ValueError" in found[1]["error"]
        assert [len(row.failures) for row in report.rows] == [1, 1]


@pytest.mark.parametrize(
    ("editor", "error"),
    [
        ({"editor": "ft", "region": {"branches": ["fusion"]}}, SiteError),
        ({"editor": "mend"}, TrainedError),
        ({"editor": "ike", "pool": "nowhere.json"}, DataError),
    ],
)
def test_an_editor_that_can_edit_nothing_stops_the_run(editor, error, tmp_path, mllm):
    with pytest.raises(RunError, match=r"editors\.row cannot be used here") as caught:
        run(tmp_path, prepared(tmp_path, "single", {"row": editor}, 2), mllm=mllm)
    assert isinstance(caught.value.__cause__, error)


def dying(folder, config, at):
    """Run until `at` lines are on disk; then write half a line and be killed."""
    torch.set_num_threads(1)
    real, count = Journal.add, [0]

    def add(journal, line):
        if count[0] == at:
            with journal.path.open("a") as file:
                file.write(json.dumps(line)[:25])
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1
        real(journal, line)

    Journal.add = add
    run(folder, config)


def files_of(folder):
    """Every journal of a run."""
    root = folder / "runs" / "run"
    assert not list(root.rglob(".*"))
    return {
        path.relative_to(root).as_posix(): lines(path, ("seconds", "where"))
        for path in root.rglob("*.jsonl")
    }


@pytest.mark.parametrize("kind", PROTOCOLS)
def test_a_killed_run_goes_on_to_the_same_files(kind, tmp_path, mllm):
    """Killed in the baseline, between edits, while all of them are scored, and near the end."""
    # Two that share all they can: killed between them, the second does without the first.
    editors = {"lora": LORA, "again": LORA, "picky": SOME | {"fails": "1"}}
    run(tmp_path / "whole", prepared(tmp_path / "whole", kind, editors, 4), mllm=mllm)
    whole = files_of(tmp_path / "whole")
    config = prepared(tmp_path / "killed", kind, editors, 4)
    for at in {"single": (2, 3, 6), "sequential": (5, 4, 4, 6), "batch": (9, 1)}[kind]:
        process = multiprocessing.get_context("fork").Process(
            target=dying, args=(tmp_path / "killed", config, at)
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    run(tmp_path / "killed", config, mllm=mllm)
    assert files_of(tmp_path / "killed") == whole
    every = {"single": 4, "sequential": 7, "batch": 4 + 4}[kind]
    assert len(whole["editors/lora/records.jsonl"]) == every
    first, second = (whole[f"editors/{n}/records.jsonl"] for n in ("lora", "again"))
    assert [x | {"editor": "lora"} for x in second] == first


def test_a_finished_run_is_read_and_not_run_again(tmp_path, mllm, monkeypatch):
    config = prepared(tmp_path, "single", {"some": SOME}, 2)
    first = run(tmp_path, config, mllm=mllm)
    monkeypatch.setattr("editing.evaluation.running.mllm_of", None)
    from editing.evaluation.running import evaluate

    assert evaluate(config, tmp_path / "runs").as_json() == first.as_json()


def test_an_editor_may_be_added_and_one_with_other_settings_starts_again(tmp_path, mllm):
    data = setup(tmp_path, 2)
    run(tmp_path, config_of(tmp_path, data, {"a": SOME, "b": SOME}), mllm=mllm)
    kept = (own(tmp_path, "a") / "records.jsonl").read_bytes()
    editors = {"a": SOME, "b": NOTHING, "c": SOME}
    report = run(tmp_path, config_of(tmp_path, data, editors), mllm=mllm)
    assert [row.name for row in report.rows] == ["unedited", "a", "b", "c"]
    assert (own(tmp_path, "a") / "records.jsonl").read_bytes() == kept
    assert [x["edit"]["drawn"] for x in lines(own(tmp_path, "b") / "records.jsonl")] == [0, 0]


def test_another_evaluation_in_the_folder_is_refused(tmp_path, mllm):
    config = prepared(tmp_path, "single", {"some": SOME}, 3)
    run(tmp_path, limited(config, limit=2), mllm=mllm)
    with pytest.raises(RunError, match=r"data\.limit: 2 -> None.*--overwrite"):
        run(tmp_path, config, mllm=mllm)
    run(tmp_path, config, mllm=mllm, overwrite=True)
    assert len(lines(own(tmp_path, "some") / "records.jsonl")) == 3
    setup(tmp_path, found=items(3)[::-1])
    with pytest.raises(RunError, match=r"records\.json changed since"):
        run(tmp_path, config, mllm=mllm)


def test_a_folder_of_something_else_is_left_alone(tmp_path, mllm):
    config = prepared(tmp_path, "single", {"some": SOME}, 1)
    other = tmp_path / "runs" / "run"
    other.mkdir(parents=True)
    (other / "config.yaml").write_text("name: run\ntuner: {method: lora}\n")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="holds no evaluation of edits"):
            run(tmp_path, config, mllm=mllm, overwrite=overwrite)
    assert [p.name for p in other.iterdir()] == ["config.yaml"]


def test_more_edits_than_records_are_refused(tmp_path, mllm):
    config = prepared(tmp_path, "sequential", {"some": SOME}, 3)
    with pytest.raises(RunError, match=r"has 4.*3 records.*protocol\.counts=\[1, 2, 3\]"):
        run(tmp_path, config, mllm=mllm)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_missing_images_are_told_with_what_to_do(on_error, tmp_path, mllm):
    config = prepared(tmp_path, "single", {"some": SOME}, 2)
    nowhere = limited(config, images=str(tmp_path / "nowhere"), on_error=on_error)
    with pytest.raises(DataError) as caught:
        run(tmp_path, nowhere, mllm=mllm)
    text = str(caught.value)
    assert "missing image" in text
    assert "data.stand_ins=DIR" in text
    assert "nowhere" in text
    assert not (tmp_path / "runs" / "run").exists()
