"""The arguments of `mmtune analyze` and `mmtune compress`, and what the two show."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from mmtune.shown import Findings


def add_commands(new: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add both commands; `new` makes the parser of a command from its name and summary.

    The parsed options have `show`, which takes them and returns `Findings`.
    """
    analyze = new("analyze", "study the weight updates of a run")
    _add_source(analyze)
    analyze.add_argument("--out", type=Path, help="folder to write (default: RUN/analysis)")
    analyze.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        metavar="PART",
        help="sizes of the decompositions, as parts of an SVD of rank 1 of every block",
    )
    analyze.set_defaults(show=_analyze)

    compress = new("compress", "turn weight updates into an Aurora adapter")
    _add_source(compress)
    compress.add_argument("--rank", type=int, required=True, help="rank of the new adapter")
    compress.add_argument("--core", choices=("diagonal", "dense"), default="diagonal")
    compress.add_argument("--out", type=Path, required=True, help="adapter folder to write")
    compress.set_defaults(show=_compress)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, nargs="?", metavar="RUN_OR_FOLDER", help="a run, or an adapter folder"
    )
    parser.add_argument("--base", metavar="MODEL", help="base model, where no run names it")
    parser.add_argument(
        "--tuned", metavar="FOLDER", help="a fully fine-tuned model instead, or its name"
    )
    parser.add_argument("--starts", type=int, default=3, help="starts of a CP decomposition")
    parser.add_argument("--seed", type=int, default=0, help="seed of its random starts")


def _analyze(options: argparse.Namespace) -> Findings:
    from mmtune.analysis import running, sources, tables
    from mmtune.tables import sheet_table

    out = running.default_folder(options.source, options.out)
    budgets = options.budgets or running.BUDGETS
    running.check(budgets, options.starts)
    source = sources.find(options.source, options.base, options.tuned)
    found = running.analyze(source, out, budgets, options.starts, options.seed)
    sheets = [*map(tables.heat_sheet, tables.heat_maps(found)), *tables.sheets(found)]
    lines = [f"page:  {out / running.PAGE}", f"lines: {out / running.LINES}"]
    return Findings([sheet_table(sheet) for sheet in sheets], lines)


def _compress(options: argparse.Namespace) -> Findings:
    from mmtune.analysis import compressing, sources, tables
    from mmtune.tables import sheet_table

    settings = (options.out, options.rank, options.core, options.starts)
    compressing.check(*settings)
    source = sources.find(options.source, options.base, options.tuned)
    found = compressing.compress(source, *settings, seed=options.seed)
    table = sheet_table(tables.compression_sheet(found))
    return Findings([table], [f"adapter: {options.out}"])
