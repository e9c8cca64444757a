"""Comparison configs: the grid that they mean, and every mistake at once at its own key."""

from __future__ import annotations

import pytest

from mmtune.compare.config import cells, is_comparison, load_comparison, search_cells
from mmtune.config import ConfigError
from tests.compare.small import CONFIG, SEARCH


def mistakes(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_comparison(path, overrides)
    return [str(m) for m in caught.value.mistakes]


def test_the_grid_is_methods_times_seeds_with_one_budget(write):
    config = load_comparison(write(CONFIG))
    grid = cells(config)
    assert [cell.folder for cell in grid] == [
        "cells/narrow-seed0", "cells/narrow-seed1", "cells/wide-seed0", "cells/wide-seed1",
    ]  # fmt: skip
    assert [(c.config.seed, c.config.tuner_options.rank, c.config.training.lr) for c in grid] == [
        (0, 1, 1e-2), (1, 1, 1e-2), (0, 4, 2e-2), (1, 4, 2e-2),
    ]  # fmt: skip
    assert len({(c.config.training.epochs, c.config.training.batch_size) for c in grid}) == 1
    assert {c.split for c in grid} == {"test"}


def test_a_search_never_names_the_test_split_and_gives_every_method_the_same(write):
    config = load_comparison(write(CONFIG + SEARCH))
    grid = search_cells(config)
    assert all(cell.config.data.test is None and cell.split == "val" for cell in grid)
    tried = {}
    for cell in grid:
        training = cell.config.training
        budget = (cell.seed, training.lr, training.epochs, training.max_steps, training.batch_size)
        tried.setdefault(cell.method, []).append(budget)
    assert tried["narrow"] == tried["wide"]
    assert len(tried["narrow"]) == 3 * 2
    assert len({cell.folder for cell in grid}) == len(grid)


def test_overrides_reach_a_method_and_the_shared_sections(write):
    config = load_comparison(
        write(CONFIG), ["methods.wide.tuner.rank=7", "training.epochs=3", "seeds=[5]"]
    )
    assert config.methods["wide"].tuner_options.rank == 7
    assert [run.training.epochs for run in config.methods.values()] == [3, 3]
    assert config.seeds == [5]
    assert config.document["training"]["epochs"] == 3


def test_mistakes_of_all_methods_come_at_once_with_their_keys(write):
    text = CONFIG.replace("rank: 1", "rnak: 1").replace("lr: 2e-2", "lr: fast, batch_size: 8")
    text = text.replace("seeds: [0, 1]", "seed: 3").replace("epochs: 2", "epochs: none")
    text = text.replace("  test: {format: folder, path: test}\n", "")
    found = mistakes(write(text + "  ../up: {tuner: {method: low}}\n  bare: 3\n"))
    for part in (
        "small.yaml:2: seed: unknown key, got 3; expected one of name,",
        "small.yaml:11: methods.narrow.tuner.rnak: unknown key, got 1",
        "small.yaml:14: methods.wide.training.lr: expected a number, got 'fast'",
        "small.yaml:14: methods.wide.training.batch_size: a method has only lr, weight_decay",
        "training.epochs: expected a number, got 'none'",
        "data.test: must be set to compare",
        "methods.../up: expected letters",
        "small.yaml:16: methods.bare: expected a mapping with tuner (and training), got 3",
    ):
        assert sum(part in line for line in found) == 1, (part, found)
    assert len(found) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seeds=[1, 1]", "seeds: expected different whole numbers, got [1, 1]"),
        ("seeds=[]", "seeds: expected different whole numbers, got []"),
        ("methods={}", "methods: expected a mapping such as lora"),
        ("methods.wide.tuner=null", "methods.wide.tuner.method: expected a name, is missing"),
        ("methods.wide.training=3", "methods.wide.training: expected a mapping, got 3"),
        ("methods.wide.model=x", "methods.wide.model: unknown key, got 'x'; expected one of tuner"),
        ("search={lr: []}", "search.lr: "),
        ("search={lr: [1e-3, 1e-3]}", "search: lr lists a value twice"),
        ("search={lr: [1e-3], split: test}", "search.split: expected one of val, got 'test'"),
        ("search={}", "search.lr: missing"),
        ("metrics=fit", "metrics: expected a list, got 'fit'"),
        ("training.keep=best", "training: keep: best needs evaluate: epoch"),
    ],
)
def test_single_mistakes(write, change, message):
    found = mistakes(write(CONFIG), change)
    assert len(found) == 1, found
    assert message in found[0]


def test_a_search_needs_a_val_split_and_a_section(write):
    text = CONFIG.replace("  val: {format: folder, path: val}\n", "")
    assert "data.val: must be set to search" in mistakes(write(text + SEARCH))[0]
    with pytest.raises(ConfigError, match="search: missing; --search needs it"):
        search_cells(load_comparison(write(CONFIG)))


def test_comparisons_are_told_from_runs(write):
    from mmtune.config import find_config

    assert is_comparison(write(CONFIG))
    assert not is_comparison(find_config("demo/retrieval"))
