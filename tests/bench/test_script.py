"""A measurement from the command line: options in, the table out, and files where --out says."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from mmtune.bench import script


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    kept_layers: int = 3
    dtype: str = "float32"
    share: float = 0.5


@dataclass(frozen=True)
class Found:
    """What was found."""

    settings: Settings
    rates: dict[int, float]


def run(*arguments):
    script.main(
        "sleeping",
        "How fast one sleeps.",
        Settings,
        lambda settings: Found(settings, {1: 2.0}),
        lambda found: f"layers: {found.settings.kept_layers}",
        arguments,
    )


def test_options_are_the_settings_and_all_is_written(tmp_path, capsys):
    run("--kept-layers", "7", "--share=0.25", "--out", str(tmp_path / "new/folder"))
    text = capsys.readouterr().out
    folder = tmp_path / "new/folder"
    assert sorted(path.name for path in folder.iterdir()) == ["sleeping.json", "sleeping.md"]
    assert text == (folder / "sleeping.md").read_text() == "layers: 7\n"
    assert json.loads((folder / "sleeping.json").read_text()) == {
        "settings": {"kept_layers": 7, "dtype": "float32", "share": 0.25},
        "rates": {"1": 2.0},
    }


def test_nothing_is_written_unless_told_where(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run()
    assert capsys.readouterr().out == "layers: 3\n"
    assert list(tmp_path.iterdir()) == []


def test_help_and_mistakes(capsys):
    with pytest.raises(SystemExit) as error:
        run("--help")
    assert error.value.code == 0
    told = capsys.readouterr().out
    for part in ("python -m mmtune.bench.sleeping", "How fast one sleeps.", "--kept-layers",
                 "folder of sleeping.md"):  # fmt: skip
        assert part in told
    with pytest.raises(SystemExit):
        run("--kept-layers=many")
    assert "invalid int value: 'many'" in capsys.readouterr().err
