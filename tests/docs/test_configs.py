"""Every shipped config loads, opens with its command, and resolves to what it says."""

from __future__ import annotations

import shlex

import pytest

from mmtune.compare.config import cells, is_comparison, load_comparison, search_cells
from mmtune.config import config_names, load_config, to_yaml
from tests.docs.loaders import WRITERS, loader

# Folders whose configs have another shape are read by the commands that own them.
OURS = {n: p for n, p in config_names().items() if n.partition("/")[0] in ("demo", "train")}
EDITS = {
    n: p
    for n, p in config_names().items()
    if p.read_text("utf-8").startswith(("# mmtune edit", "# mmtune build", "# mmtune probe"))
}
OURS = {n: p for n, p in OURS.items() if n not in EDITS}
COMPARISONS = {n: p for n, p in OURS.items() if is_comparison(p)}
RUNS = {n: p for n, p in OURS.items() if n not in COMPARISONS}


def test_there_are_shipped_configs():
    assert {"demo/retrieval", "demo/retrieval_lora"} <= set(RUNS)
    assert "demo/compare" in COMPARISONS
    data = {"evqa", "eic", "vlkeb"}
    assert {"demo/edit", "demo/edit_train_mend", "demo/edit_train_serac"} <= set(EDITS)
    assert {f"edit/{d}_{m}" for d in data for m in ("llava", "blip2")} <= set(EDITS)
    built = {f"build/{d}_{m}" for d in ("evqa", "eic") for m in ("llava", "blip2")}
    assert {"demo/build", "build/evqa_folder", "build/evqa_llava_ray"} | built <= set(EDITS)


@pytest.mark.parametrize("name", RUNS)
def test_config_loads_and_reads_back(name, tmp_path):
    config = load_config(RUNS[name])
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(copy) == config


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_cell_of_a_comparison_is_a_run_that_reads_back(name, tmp_path):
    config = load_comparison(COMPARISONS[name])
    grid = cells(config) + (search_cells(config) if config.search else [])
    assert len(grid) >= len(config.methods) * len(config.seeds)
    copy = tmp_path / "copy.yaml"
    for cell in grid:
        copy.write_text(to_yaml(cell.config), encoding="utf-8")
        assert load_config(copy) == cell.config


def opening(path):
    """The parsed command in a config's first line."""
    from mmtune.cli import build_parser

    first = path.read_text(encoding="utf-8").partition("\n")[0]
    program, *arguments = shlex.split(first.removeprefix("#"))
    assert program == "mmtune"
    options, rest = build_parser().parse_known_args(arguments)
    assert rest == []
    return options


@pytest.mark.parametrize("name", OURS)
def test_config_opens_with_the_command_that_runs_it(name):
    options = opening(OURS[name])
    assert options.command == ("compare" if name in COMPARISONS else "train")
    assert options.config == f"configs/{name}.yaml"


@pytest.mark.parametrize("name", EDITS)
def test_edit_config_loads_by_the_command_that_it_opens_with_and_reads_back(name, tmp_path):
    options = opening(EDITS[name])
    assert options.command in WRITERS
    assert options.config == f"configs/{name}.yaml"
    config = loader(options.command)(EDITS[name], options.overrides)
    copy = tmp_path / "copy.yaml"
    copy.write_text(WRITERS[options.command](config), encoding="utf-8")
    assert loader(options.command)(copy) == config


def test_run_names_are_unique():
    names = [load_config(path).name for path in RUNS.values()]
    names += [load_comparison(path).name for path in COMPARISONS.values()]
    names += [loader(opening(path).command)(path).name for path in EDITS.values()]
    assert len(set(names)) == len(names)
