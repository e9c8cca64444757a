"""`mmtune compare`: what it prints, and its exit codes."""

from __future__ import annotations

import pytest

from mmtune import cli
from mmtune.compare import running
from tests.compare import small
from tests.compare.small import BROKEN, CONFIG, SEARCH

ONE_SEED = CONFIG.replace("seeds: [0, 1]", "seeds: [0]")


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch, tmp_path):
    """The command's processes need the fake task too."""
    for name in ("compare", "search"):
        function = getattr(running, name)

        def with_setup(config, runs, tell, function=function, **settings):
            return function(config, runs, tell, small.install, **settings)

        monkeypatch.setattr(running, name, with_setup)
    monkeypatch.chdir(tmp_path)


def test_table_goes_to_stdout_and_progress_to_stderr(write, tmp_path, capsys):
    assert cli.main(["compare", str(write(ONE_SEED)), "name=other", "training.epochs=1"]) == 0
    out, err = capsys.readouterr()
    assert [word for word in ("base", "narrow", "wide") if f"│ {word} " in out] == [
        "base", "narrow", "wide",
    ]  # fmt: skip
    assert "6 steps of batch 4 for each method" in " ".join(out.split())
    assert "page: runs/other/compare.html" in out
    assert (tmp_path / "runs/other/compare.html").is_file()
    assert "narrow-seed0 (1 of 2): fit -" in err


def test_a_failed_method_gives_exit_code_1_after_the_table(write, capsys):
    text = ONE_SEED.replace("methods:\n", f"methods:\n{BROKEN}")
    assert cli.main(["compare", str(write(text))]) == 1
    out, err = capsys.readouterr()
    assert "│ wide " in out
    assert "failed: cells/broken-seed0: ValueError: no place for it" in err


def test_search_prints_the_rates_and_the_lines_to_paste(write, capsys):
    import yaml

    path = write(ONE_SEED + SEARCH.replace("[0, 1]", "[0]"))
    assert cli.main(["compare", str(path), "--search"]) == 0
    out = capsys.readouterr().out
    pasted = yaml.safe_load(out[out.index("methods:") :])
    assert set(pasted["methods"]) == {"narrow", "wide"}
    for method in pasted["methods"].values():
        assert method["training"]["lr"] in (1e-3, 1e-2, 1e-1)


def test_user_errors_exit_2(write, capsys):
    path = str(write(CONFIG))
    assert cli.main(["compare", path, "--search"]) == 2
    assert "search: missing" in capsys.readouterr().err
    assert cli.main(["compare", path, "methods.wide.tuner.rank=0", "seeds=[]"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: 2 mistakes in the config:")
    assert "methods.wide.tuner.rank" in err
