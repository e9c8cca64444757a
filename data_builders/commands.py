"""The arguments of `mmtune build`, and what it shows."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mmtune.shown import Findings

if TYPE_CHECKING:
    from data_builders.config import BuildConfig
    from data_builders.pipeline import Built

DONE, FAULTS, USER_ERROR = 0, 1, 2


def add_commands(new: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the command, see `editing.commands.add_commands`."""
    build = new("build", "make edit records of what a model gets wrong, from images and questions")
    build.add_argument("config", help="a YAML file, or the name of a shipped config")
    build.add_argument("overrides", nargs="*", metavar="key=value", help="such as limit=100")
    build.add_argument(
        "--remake", action="store_true", help="remove what another config made, and make it again"
    )
    build.add_argument("--until", metavar="STAGE", help="stop after this stage, such as select")
    build.add_argument(
        "--dry-run", action="store_true", help="check files and say what is to do, do nothing"
    )
    build.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")
    build.set_defaults(show=_build)


def _build(options: argparse.Namespace) -> Findings:
    from data_builders.config import load_build_config
    from data_builders.pipeline import build
    from data_builders.shards import rank
    from data_builders.stages.assemble import DEFECTS
    from data_builders.tables import build_table, defect_table

    config = load_build_config(options.config, options.overrides)
    if options.dry_run:
        return _dry_run(config, options)
    try:
        built = build(config, options.runs, options.remake, options.until)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("finished shards are kept; the same command goes on") from None
    code = FAULTS if built.faults or built.defects else DONE
    if rank():
        return Findings([], [], code)
    tables = [build_table(config.name, built)]
    tables += [defect_table(built.folder / DEFECTS)] if built.defects else []
    return Findings(tables, _lines(config, built), code, wide=True, errors=_errors(built))


def _lines(config: BuildConfig, built: Built) -> list[str]:
    lines = [f"note: {note}" for note in built.notes]
    selected = next((r.kept for r in built.reports if r.slot == "select"), None)
    if config.limit is not None and selected is not None and selected < config.limit:
        lines.append(
            f"note: the source gave {selected:,} of the {config.limit:,} samples asked for"
        )
    if not built.complete:
        return [*lines, f"stopped where --until says; {built.folder} holds what is finished"]
    return [
        *lines,
        f"records: {built.folder / 'data'}",
        f"card:    {built.folder / 'README.md'}",
        f"gallery: {built.folder / 'gallery.html'}",
    ]


def _errors(built: Built) -> list[str]:
    found = []
    if built.faults:
        file = built.folder / "faults.jsonl"
        found.append(f"{built.faults:,} samples were set aside as something is broken: {file}")
    if built.defects:
        file = built.folder / "defects.jsonl"
        found.append(f"{built.defects:,} defects are left in the records: {file}")
    return found


def _dry_run(config: BuildConfig, options: argparse.Namespace) -> Findings:
    from data_builders.dry_runs import dry_run
    from data_builders.tables import outlook_table

    found = dry_run(config, options.runs)
    lines = [f"note: {note}" for note in found.notes]
    lines.append("nothing was made or written (--dry-run)")
    refused = bool(found.stale) and not options.remake
    errors = ["stale stages: --remake removes their outputs and makes them again"] * refused
    code = USER_ERROR if refused else DONE
    return Findings([outlook_table(config.name, found)], lines, code, wide=True, errors=errors)
