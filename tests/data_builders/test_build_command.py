"""`mmtune build`: tables, exit codes, and what it says where it stops."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from mmtune import cli
from tests.data_builders import small_build
from tests.data_builders.small_build import OPENED, write_config


@pytest.fixture(autouse=True)
def _small(monkeypatch, tmp_path):
    small_build.install(monkeypatch.setattr)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.chdir(tmp_path)
    OPENED.clear()


@pytest.fixture
def config(tmp_path):
    return str(write_config(tmp_path))


def row(text, name):
    """The cells of a line of a table."""
    line = next(line for line in text.splitlines() if line.startswith(f"│ {name} "))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_it_builds_and_shows_what_became_of_samples(config, capsys, tmp_path):
    assert cli.main(["build", config]) == 0
    out = capsys.readouterr().out
    assert row(out, "select")[:6] == ["select", "keen", "13", "10", "3 of no use", "0"]
    assert row(out, "assemble")[:6] == ["assemble", "", "8", "8", "0", "0"]
    folder = tmp_path / "runs/small"
    assert f"records: {folder / 'data'}" in out
    assert (folder / "data/train.json").exists()


def test_faults_are_exit_code_1_also_when_nothing_is_left_to_do(config, capsys, tmp_path):
    arguments = ["build", config, "source.broken=[3]", "--runs", "elsewhere"]
    for _ in range(2):
        assert cli.main(arguments) == 1
        told = capsys.readouterr()
        assert row(told.out, "collect")[4:6] == ["0", "1 broken record"]
        assert "1 samples were set aside as something is broken: " in told.err
    assert (tmp_path / "elsewhere/small/faults.jsonl").exists()


def test_a_stale_build_is_exit_code_2_and_remake_makes_it_again(config, capsys):
    assert cli.main(["build", config]) == 0
    arguments = ["build", config, "stages.filter.word=b"]
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert 'filter: settings.word changed from "a" to "b"' in err
    assert "--remake" in err
    assert cli.main([*arguments, "--remake"]) == 0
    assert cli.main(arguments) == 0


def test_until_and_the_limit_that_was_not_reached_are_told(config, capsys, tmp_path):
    assert cli.main(["build", config, "limit=50", "--until", "select"]) == 0
    out = capsys.readouterr().out
    assert "note: the source gave 10 of the 50 samples asked for" in out
    assert "stopped where --until says" in out
    assert not (tmp_path / "runs/small/data").exists()
    assert cli.main(["build", config, "--until", "slect"]) == 2
    assert "Did you mean 'select'" in capsys.readouterr().err


def test_a_dry_run_says_what_is_to_do_and_writes_nothing(config, capsys, tmp_path):
    assert cli.main(["build", config, "--dry-run", "source.broken=[3]"]) == 0
    out = capsys.readouterr().out
    assert row(out, "collect") == ["collect", "numbers", "to do", "12", "faults: 1 broken record"]
    assert row(out, "assemble")[2] == "to do"
    assert "nothing was made or written (--dry-run)" in out
    assert not (tmp_path / "runs").exists()
    assert OPENED == []


def test_a_dry_run_over_a_build_tells_done_begun_and_stale(config, capsys, monkeypatch):
    assert cli.main(["build", config, "stages.imagine.fail=n9"]) == 2
    told = capsys.readouterr().err
    assert "imagine (draw) failed in shard 2 (samples n8 to n10): ZeroDivisionError" in told
    assert "Traceback" not in told
    assert cli.main(["build", config, "stages.imagine.fail=n9", "--dry-run"]) == 0
    out = capsys.readouterr().out
    states = [row(out, name)[2] for name in ("collect", "rephrase", "imagine", "filter")]
    assert states == ["done", "done", "begun", "to do"]
    arguments = ["build", config, "stages.rephrase.word=b", "--dry-run"]
    assert cli.main(arguments) == 2
    told = capsys.readouterr()
    assert row(told.out, "rephrase")[2:] == [
        "stale",
        "",
        'settings.word changed from "a" to "b"',
    ]
    assert row(told.out, "imagine")[2] == "stale"
    assert "--remake" in told.err
    assert cli.main([*arguments, "--remake"]) == 0


def test_missing_files_and_mistakes_are_exit_code_2(config, capsys, tmp_path):
    assert cli.main(["build", config, "stages.select.by=kean", "limit=0"]) == 2
    assert "2 mistakes in the config" in capsys.readouterr().err
    (tmp_path / "numbers.txt").unlink()
    for more in ([], ["--dry-run"]):
        assert cli.main(["build", config, *more]) == 2
        assert "numbers.txt (collect: source numbers)" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(config, capsys, monkeypatch):
    def stop(self, samples):
        raise KeyboardInterrupt

    monkeypatch.setattr(small_build.Shout, "run", stop)
    assert cli.main(["build", config]) == 130
    assert "stopped; finished shards are kept; the same command goes on" in capsys.readouterr().err
    monkeypatch.undo()


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from mmtune import cli\n"
        "try: cli.main(['build', '--help'])\n"
        "except SystemExit: pass\n"
        "print('heavy', sorted({'torch', 'pydantic', 'PIL', 'ray', 'yaml'} & set(sys.modules)))"
    )
    start = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--remake" in out.stdout
    assert "heavy []" in out.stdout
    assert time.monotonic() - start < 10
