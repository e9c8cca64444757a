"""`mmtune compare`: trains what is missing, cell by cell, and writes what is known."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from mmtune.compare.base import Base, evaluate_base, read_base
from mmtune.compare.cells import Outcome, Setup, outcome, run_cell, state, steps_done
from mmtune.compare.choosing import Choice, choices, write_choices
from mmtune.compare.config import Cell, CompareConfig, cells, search_cells
from mmtune.compare.table import Table, write_table
from mmtune.report.numbers import duration
from mmtune.runs import RunError, write_text
from mmtune.suggestions import did_you_mean
from mmtune.yaml_source import as_yaml

CONFIG = "compare.yaml"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Grid:
    """Where and how cells are run.

    Attributes:
        root: the comparison's folder.
        tell: receives one line for each thing that was done.
        setup: called first in every process; register tasks, methods or backbones of your own.
        overwrite: train every cell again.
        apart: each cell in a process of its own, which no other cell can harm.
    """

    root: Path
    tell: Tell
    setup: Setup = None
    overwrite: bool = False
    apart: bool = True


def compare(
    config: CompareConfig,
    runs: Path,
    tell: Tell = lambda text: None,
    setup: Setup = None,
    overwrite: bool = False,
    apart: bool = True,
) -> Table:
    """Train every method with every seed, and write compare.html, compare.md and results.jsonl.

    Cells that are finished are kept, so that the same call goes on where another one stopped.

    Args:
        config: the comparison.
        runs: folder of run folders; everything is written into runs/NAME.
        tell: receives one line for each thing that was done.
        setup: called first in every process; register tasks, methods or backbones of your own.
        overwrite: train every cell again.
        apart: each cell in a process of its own. In this process they start faster; one that is
            killed ends them all, and on a CPU the peak memory is that of the largest so far.

    Raises:
        RunError: the folder holds something else, or the base model cannot be evaluated.
    """
    from mmtune.compare.page import write_page

    grid = Grid(_claimed(config, runs), tell, setup, overwrite, apart)
    wanted = cells(config)
    base = _base(grid, wanted)
    _check_metrics(config.metrics, base)
    chosen = _search_so_far(config, grid.root)

    def write(outcomes: Sequence[Outcome]) -> Table:
        table = Table(config, base, outcomes, chosen)
        write_table(table, grid.root)
        return table

    table = write(_run(grid, wanted, base, write))
    write_page(table, grid.root)
    return table


def search(
    config: CompareConfig,
    runs: Path,
    tell: Tell = lambda text: None,
    setup: Setup = None,
    overwrite: bool = False,
    apart: bool = True,
) -> list[Choice]:
    """Try every rate of `search.lr` for every method on the val split; see `compare`.

    Raises:
        ConfigError: the config has no `search`.
        RunError: as `compare`.
    """
    wanted = search_cells(config)
    grid = Grid(_claimed(config, runs), tell, setup, overwrite, apart)
    base = _base(grid, wanted)
    assert config.search is not None
    _check_metrics([config.search.metric] if config.search.metric else [], base)
    found = choices(config, base.primary, _run(grid, wanted, base))
    write_choices(found, grid.root)
    return found


def _claimed(config: CompareConfig, runs: Path) -> Path:
    """The comparison's folder. RunError where something else is in it."""
    root = runs / config.name
    if root.exists() and any(root.iterdir()) and not (root / CONFIG).is_file():
        raise RunError(
            f"{root} exists and holds no comparison (no {CONFIG}), so it is left alone. "
            "Choose another name with name=NAME."
        )
    root.mkdir(parents=True, exist_ok=True)
    text = as_yaml(config.document)
    write_text(root / CONFIG, text)
    return root


def _base(grid: Grid, wanted: Sequence[Cell]) -> Base:
    """Read it where nothing is left to train; else evaluate, since cells need its details."""
    finished = all(state(cell, grid.root).kind == "done" for cell in wanted)
    found = read_base(wanted[0], grid.root) if finished and not grid.overwrite else None
    if found is None:
        grid.tell(f"evaluating the base model on {wanted[0].split}")
        found = evaluate_base(wanted[0], grid.root, grid.setup, grid.apart)
    return found


def _check_metrics(names: Sequence[str], base: Base) -> None:
    for name in names:
        if name not in base.metrics:
            raise RunError(
                f"no metric {name!r}; the task has {', '.join(base.metrics)}."
                + did_you_mean(name, base.metrics)
            )


def _run(
    grid: Grid,
    wanted: Sequence[Cell],
    base: Base,
    after_each: Callable[[Sequence[Outcome]], object] = lambda outcomes: None,
) -> list[Outcome]:
    """Train what is not finished. Returns the outcome of every wanted cell."""
    found = {cell.folder: outcome(cell, grid.root) for cell in wanted}
    todo = [c for c in wanted if grid.overwrite or found[c.folder].status != "done"]
    grid.tell(f"{len(wanted) - len(todo)} of {len(wanted)} cells are done")
    begun = time.monotonic()
    assert base.evaluation is not None or not todo
    with tqdm(total=len(todo), unit="cell", smoothing=0, disable=None) as bar:
        for number, cell in enumerate(todo, 1):
            name = Path(cell.folder).name
            there = state(cell, grid.root)
            if there.kind == "changed":
                _say(grid, f"{name}: its config changed, so it is trained again ({there.detail})")

            def watch(cell: Cell = cell, name: str = name) -> None:
                bar.set_postfix_str(f"{name}, step {steps_done(cell, grid.root)}")

            at = time.monotonic()
            now = run_cell(
                cell,
                grid.root,
                base.evaluation,  # type: ignore[arg-type]
                grid.setup,
                watch,
                grid.overwrite,
                grid.apart,
            )
            found[cell.folder] = now
            bar.update()
            left = (time.monotonic() - begun) / number * (len(todo) - number)
            text = f"{_in_words(now, base.primary)} in {duration(time.monotonic() - at)}"
            ahead = f"; about {duration(left)} left" if number < len(todo) else ""
            _say(grid, f"{name} ({number} of {len(todo)}): {text}{ahead}")
            after_each(list(found.values()))
    return list(found.values())


def _say(grid: Grid, text: str) -> None:
    with tqdm.external_write_mode(file=sys.stderr):
        grid.tell(text)


def _in_words(found: Outcome, primary: str) -> str:
    if found.status != "done":
        return f"{found.status}: {found.error}"
    return f"{primary} {found.results['after'][primary]['value']:.1f}"


def _search_so_far(config: CompareConfig, root: Path) -> list[Choice]:
    """What the search has found by now; nothing where there is none."""
    if config.search is None:
        return []
    wanted = search_cells(config)
    base = read_base(wanted[0], root)
    if base is None:
        return []
    return choices(config, base.primary, [outcome(cell, root) for cell in wanted])
