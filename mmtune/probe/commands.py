"""The arguments of `mmtune probe`, and what it shows."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mmtune.shown import Findings

if TYPE_CHECKING:
    from mmtune.probe.config import ProbeConfig


def add_commands(new: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the command; `new` makes the parser of a command from its name and summary.

    The parsed options have `show`, which takes them and returns `Findings`.
    """
    probe = new("probe", "compare multimodal models: prompt styles x abilities")
    probe.add_argument("config", help="a YAML file, or the name of a shipped config")
    probe.add_argument("overrides", nargs="*", metavar="key=value", help="such as items.each=4")
    probe.add_argument("--adapter", metavar="DIR", help="add the first model with this fine-tune")
    probe.add_argument("--edit", metavar="DIR", help="add the first model under this edit")
    probe.add_argument("--lmms-eval", type=Path, metavar="DIR", help="write its layouts, too")
    probe.add_argument("--overwrite", action="store_true", help="begin afresh, whatever is there")
    probe.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")
    probe.set_defaults(show=_probe)


def _probe(options: argparse.Namespace) -> Findings:
    from mmtune.probe.config import load_probe_config
    from mmtune.probe.page import PAGE, tables, write_pages
    from mmtune.probe.running import probe
    from mmtune.probe.tables import notes, numbers_of
    from mmtune.probe.writers import write_lmms_eval
    from mmtune.tables import new_table

    config = load_probe_config(options.config, options.overrides)
    config = _with_changed(config, options.adapter, options.edit)
    found = probe(config, options.runs, options.overwrite)
    numbers = numbers_of(found)
    root = options.runs / config.name
    write_pages(found, numbers, root)
    if options.lmms_eval is not None:
        write_lmms_eval(found, numbers.cells, options.lmms_eval)
    shown = []
    for title, header, rows in tables(found, numbers):
        table = new_table(*header, title=title, right=True)
        for row in rows:
            table.add_row(*row)
        shown.append(table)
    failed = sum(bool(o.error) for o in found.outcomes)
    lines = [*notes(found), f"report: {root / PAGE}"]
    if failed:
        lines.insert(0, f"{failed} requests failed; the same command asks them again")
    return Findings(shown, lines, int(bool(failed)), wide=True)


def _with_changed(config: ProbeConfig, adapter: str | None, edit: str | None) -> ProbeConfig:
    """The config with its first model once more, with an adapter, an edit, or both.

    Raises:
        ValueError: the first model is none of this toolkit's.
    """
    from dataclasses import replace

    from mmtune.probe.config import LocalOptions

    if adapter is None and edit is None:
        return config
    name, first = next(iter(config.models.items()))
    if not isinstance(first, LocalOptions):
        raise ValueError(f"--adapter and --edit need a local model, and {name} is none")
    done = " and ".join(w for w, given in (("adapter", adapter), ("edit", edit)) if given)
    changed = replace(first, adapter=adapter or first.adapter, edit=edit or first.edit)
    return replace(config, models={**config.models, f"{name}-{done.replace(' ', '-')}": changed})
