"""The arguments of `mmtune audit`, and what it shows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from editing.evaluation.commands import add_commands as add_evaluation
from editing.meta.commands import add_commands as add_training
from mmtune.shown import Findings

if TYPE_CHECKING:
    from editing.audit import Audit, Fixed

CLEAN, DEFECTS = 0, 1


def add_commands(new: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the commands; `new` makes the parser of a command from its name and summary.

    The parsed options have `show`, which takes them and returns `Findings`.
    """
    audit = new("audit", "count what is wrong with a file of edit records, and write a clean copy")
    audit.add_argument("file", metavar="FILE", help="E-VQA, E-IC or VLKEB records (JSON)")
    audit.add_argument("--against", metavar="FILE", help="what is shared with these (training)")
    audit.add_argument("--images", metavar="DIR", help="decode every image of this folder once")
    audit.add_argument(
        "--pool", metavar="FILE", help="image-locality questions with all their answers (OK-VQA)"
    )
    audit.add_argument(
        "--fix", type=Path, metavar="OUT", help="write a clean copy, and its changes"
    )
    audit.add_argument(
        "--keep", action="append", default=[], metavar="DEFECT", help="a kind that --fix leaves"
    )
    audit.add_argument("--overwrite", action="store_true", help="replace the copy of --fix")
    audit.add_argument("--json", type=Path, metavar="FILE", help="write everything found as JSON")
    audit.add_argument("--examples", type=int, default=2, help="shown per kind (default: 2)")
    audit.set_defaults(show=_audit)
    add_training(new)
    add_evaluation(new)


def _audit(options: argparse.Namespace) -> Findings:
    from editing.audit import audit
    from editing.audit.kinds import named
    from editing.audit.mending import fix_file
    from editing.audit.tables import defect_table, example_table, fact_table

    if options.examples < 0:
        raise ValueError(f"--examples must be 0 or more, got {options.examples}.")
    keep = named(options.keep)
    found = audit(options.file, options.against, options.images, options.pool)
    examples = example_table(found, options.examples)
    tables = [defect_table(found), *([examples] if examples else []), fact_table(found)]
    lines = _unchecked(found)
    left = found
    if options.fix is not None:
        fixed = fix_file(options.file, options.fix, keep, options.images, options.overwrite)
        left = audit(str(options.fix), options.against, options.images, options.pool)
        lines += _fixed(options.fix, fixed, left)
    if options.json is not None:
        _write_json(found, left, options)
        lines.append(f"json: {options.json}")
    return Findings(tables, lines, DEFECTS if left.findings else CLEAN)


def _unchecked(found: Audit) -> list[str]:
    needs: dict[str, list[str]] = {}
    for kind, need in found.unchecked.items():
        needs.setdefault(need, []).append(kind)
    return [f"not looked for without {need}: {', '.join(kinds)}" for need, kinds in needs.items()]


def _fixed(out: Path, fixed: Fixed, left: Audit) -> list[str]:
    from editing.audit.mending import changes_file

    stays = ", ".join(f"{count:,} {kind}" for kind, count in left.counts().items() if count)
    return [
        f"copy:    {out} ({len(fixed.items):,} records; {fixed.mended:,} mended, "
        f"{fixed.left_out:,} left out)",
        f"changes: {changes_file(out)}",
        f"left in the copy: {stays or 'nothing of what was looked for'}",
    ]


def _write_json(found: Audit, left: Audit, options: argparse.Namespace) -> None:
    from mmtune.runs import write_text

    content = found.as_json(options.examples)
    if left is not found:
        content["copy"] = left.as_json(options.examples)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.json, json.dumps(content, indent=2) + "\n")
