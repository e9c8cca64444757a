"""Run folders: nothing is overwritten silently, nothing is left half written."""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from mmtune.runs import (
    Results,
    RunError,
    RunFolder,
    files_named_in,
    git_commit,
    manifest,
    write_folder,
    write_text,
)
from mmtune.tasks.base import Metric


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "one")
    folder.start("name: one\nseed: 1\n")
    return folder


def finish(run):
    metric = {"R@1": Metric(1.0, 0.0, 2.0, 3)}
    run.save_results(Results(metric, metric, metric, 10, 1000, 1.5, 2, "process RSS", 4))


def test_unfinished_run_names_resume_and_overwrite(run):
    with pytest.raises(RunError, match=r"unfinished run.*--resume.*--overwrite.*name=NAME"):
        run.start("name: one\nseed: 1\n")


def test_finished_run_is_kept_unless_overwritten(run):
    finish(run)
    with pytest.raises(RunError, match=r"finished run\. Use --overwrite"):
        run.start("name: one\nseed: 2\n")
    with pytest.raises(RunError, match="nothing to resume"):
        run.start("name: one\nseed: 1\n", resume=True)
    run.start("name: one\nseed: 2\n", overwrite=True)
    assert not run.results.exists()
    assert run.config.read_text() == "name: one\nseed: 2\n"


def test_resume_with_another_config_says_what_changed(run):
    run.start("name: one\nseed: 1\n", resume=True)
    with pytest.raises(RunError, match="seed: 1 -> seed: 2"):
        run.start("name: one\nseed: 2\n", resume=True)


def test_folder_that_holds_no_run_is_never_deleted(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="holds no run"):
        RunFolder(tmp_path).start("name: x\n", overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


def test_results_hold_everything(run):
    finish(run)
    saved = json.loads(run.results.read_text())
    assert saved["share_percent"] == 1.0
    assert saved["before"]["R@1"] == {"value": 1.0, "low": 0.0, "high": 2.0, "n": 3}
    assert saved["memory_kind"] == "process RSS"


def test_log_leaves_out_an_unfinished_last_line(run):
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert run.log() == [{"step": 1}, {"step": 2}]


def test_failed_write_leaves_the_old_content_and_no_rest(tmp_path):
    target = tmp_path / "adapter"
    write_folder(target, lambda to: (to / "a").write_text("old"))

    def fail(to):
        (to / "a").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(target, fail)
    assert (target / "a").read_text() == "old"
    with pytest.raises(UnicodeEncodeError):
        write_text(target / "a", "\ud800")
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.rglob("*")] == ["adapter", "a"]


def test_manifest_has_hashes_versions_and_command(tmp_path):
    data = tmp_path / "d.parquet"
    data.write_bytes(b"abc")
    found = manifest(3, "cpu", [data, data], ["/long/way/bin/mmtune", "train", "a b"])
    assert found["command"] == "mmtune train 'a b'"
    assert found["data"] == {
        str(data): {"sha256": hashlib.sha256(b"abc").hexdigest(), "bytes": 3},
    }
    assert found["versions"]["torch"]
    json.dumps(found)


def test_files_are_found_in_nested_options(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text("x")

    @dataclass
    class Options:
        train: str
        more: list[Path]
        text: str = "not a file"

    options = Options(str(tmp_path / "a"), [tmp_path / "b", tmp_path / "missing"])
    assert files_named_in(options) == [tmp_path / "a", tmp_path / "b"]


def test_commit_is_none_outside_a_checkout_and_marks_changes(tmp_path):
    assert git_commit(tmp_path) is None

    def git(*arguments):
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        command = ["git", *identity, *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "pyproject.toml").write_text("")
    git("add", ".")
    git("commit", "-m", "one")
    commit = git_commit(tmp_path)
    assert commit is not None
    assert len(commit) == 40
    (tmp_path / "pyproject.toml").write_text("#")
    assert git_commit(tmp_path) == commit + "+changes"
