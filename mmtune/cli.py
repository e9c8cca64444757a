"""The `mmtune` command: reads arguments, calls the library, prints tables."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_builders.commands import add_commands as add_building
from editing.commands import add_commands as add_editing
from mmtune.analysis.commands import add_commands as add_analysis
from mmtune.bench.commands import add_commands as add_bench
from mmtune.converting import add_commands as add_conversion
from mmtune.probe.commands import add_commands as add_probe
from mmtune.run_listing.commands import add_commands as add_runs
from mmtune.tables import (
    LISTED,
    evaluation_table,
    new_table,
    parameter_table,
    results_table,
)
from mmtune.ui.commands import add_commands as add_ui

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from mmtune.compare.config import CompareConfig
    from mmtune.config import RunConfig
    from mmtune.runs import Results

OK, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 1 where a part failed or an audit found defects; 2 for what the user can mend; 130 after
        Ctrl-C.
    """
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes positionals in one piece only; overrides may also follow an option.
    if rest and not (hasattr(options, "overrides") and all(_is_override(text) for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    if options.command is None:
        parser.print_help()
        return OK
    logging.basicConfig(
        level=logging.INFO if options.debug else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    _quieten_libraries(options.debug)
    try:
        return options.handler(options) or OK
    except KeyboardInterrupt as stop:
        print(f"\nstopped{f'; {stop}' if str(stop) else ''}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if options.debug or not _is_user_error(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR


def build_parser() -> argparse.ArgumentParser:
    """The commands and their arguments."""
    parser = argparse.ArgumentParser(
        prog="mmtune",
        description="Parameter-efficient fine-tuning of vision-language models.",
        epilog="Configs are found by path or by name: `mmtune list configs`.",
    )
    parser.add_argument("--debug", action="store_true", help="show logs and tracebacks")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    train = _command(commands, "train", _train, "fine-tune a model as a config says")
    _add_config(train)
    train.add_argument("--resume", action="store_true", help="go on with an unfinished run")
    train.add_argument("--overwrite", action="store_true", help="replace a run of the same name")
    train.add_argument(
        "--dry-run", action="store_true", help="load and check everything, train nothing"
    )
    train.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")

    compare = _command(commands, "compare", _compare, "train several methods alike, in one table")
    _add_config(compare)
    compare.add_argument(
        "--search", action="store_true", help="choose each method's learning rate on val first"
    )
    compare.add_argument("--overwrite", action="store_true", help="train finished cells again")
    compare.add_argument(
        "--one-process", action="store_true", help="start faster; what kills one run kills all"
    )
    compare.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")

    evaluate = _command(commands, "eval", _eval, "evaluate a run, or a config's base model")
    evaluate.add_argument("run", metavar="RUN_OR_CONFIG", help="a run folder, or a config")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    evaluate.add_argument("--adapter", type=Path, help="adapter folder (a run has its own)")
    evaluate.add_argument("--split", default="test", help="split of the data (default: test)")
    evaluate.add_argument(
        "--predictions", type=Path, metavar="FILE", help="write answers or captions, to submit"
    )

    rehearsal = _command(
        commands, "rehearse", _rehearse, "train a few full-size steps on made-up data, measured"
    )
    _add_config(rehearsal)
    rehearsal.add_argument("--steps", type=int, default=20, help="optimiser steps (default: 20)")
    rehearsal.add_argument("--runs", type=Path, default=Path("runs"), help="keeps rehearsals.jsonl")

    params = _command(commands, "params", _params, "count what a config would train")
    _add_config(params)

    merge = _command(commands, "merge", _merge, "fold a run's adapter into stock weights")
    merge.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    merge.add_argument("--out", type=Path, required=True, help="folder to write")

    for add in (
        add_conversion,
        add_analysis,
        add_editing,
        add_building,
        add_probe,
        add_bench,
        add_runs,
        add_ui,
    ):
        add(lambda name, summary: _command(commands, name, _show, summary))

    listing = _command(commands, "list", _list, "show what there is")
    listing.add_argument(
        "what", nargs="?", help=f"{', '.join(LISTED)}, or the name of a method or an editor"
    )
    listing.add_argument(
        "--matrix", action="store_true", help="which method is tested on which backbone"
    )
    return parser


def _command(commands: Any, name: str, handler: Any, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:])
    parser.set_defaults(command=name, handler=handler)
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file, or the name of a shipped config")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as training.lr=1e-3"
    )


def _train(options: argparse.Namespace) -> int:
    from mmtune.config import load_config
    from mmtune.device import leave_together
    from mmtune.finetuning import fine_tune, first_process
    from mmtune.runs import RunFolder

    config = load_config(options.config, options.overrides)
    folder = RunFolder(options.runs / config.name)
    if first_process():
        folder.check(resume=options.resume, overwrite=options.overwrite or options.dry_run)
    if options.dry_run:
        return _dry_run(config)
    try:
        results = fine_tune(config, folder, options.resume, options.overwrite, tell=_tell)
    except KeyboardInterrupt:
        _tell(f"{folder.path} is unfinished; the same command with --resume goes on with it")
        raise
    if first_process():
        _print(results_table(config, results))
        _print_costs(results)
        print(f"adapter: {folder.adapter}\nreport:  {folder.path / 'report.html'}")
    leave_together()
    return OK


def _dry_run(config: RunConfig) -> int:
    from mmtune.dry_runs import dry_run
    from mmtune.finetuning import first_process
    from mmtune.tables import memory_table, need_table

    found = dry_run(config)
    if first_process():
        _print(need_table(found))
        _print(parameter_table(config, found.model, found.groups))
        _print(memory_table(config, found.memory))
        if found.samples is not None:
            steps = found.samples // config.training.batch_size // config.training.accumulation
            print(
                f"{found.samples:,} training samples, about {steps:,} steps an epoch on one process"
            )
        print("nothing was trained or written (--dry-run)")
        for need in found.missing:
            print(f"missing: {need.key}: {need.what} ({need.text})", file=sys.stderr)
    return USER_ERROR if found.missing else OK


def _rehearse(options: argparse.Namespace) -> None:
    from mmtune.config import load_config
    from mmtune.rehearsal import rehearse
    from mmtune.tables import rehearsal_table

    record = options.runs / "rehearsals.jsonl"
    found = rehearse(load_config(options.config, options.overrides), options.steps, record, _tell)
    _print(rehearsal_table(found))
    print(f"added to {record}")


def _compare(options: argparse.Namespace) -> int:
    from mmtune.compare.config import load_comparison

    config = load_comparison(options.config, options.overrides)
    command = _search if options.search else _compare_methods
    try:
        return command(config, options)
    except KeyboardInterrupt:
        _tell("finished cells are kept; the same command goes on with the others")
        raise


def _compare_methods(config: CompareConfig, options: argparse.Namespace) -> int:
    from mmtune.compare.running import compare

    found = compare(
        config,
        options.runs,
        _tell,
        overwrite=options.overwrite,
        apart=not options.one_process,
    )
    table = new_table(*found.header(), title=config.name, right=True)
    for line in found.lines():
        table.add_row(*line)
    table.caption = "\n".join(found.notes())
    _print(table, piped=160)
    print(f"page: {options.runs / config.name / 'compare.html'}")
    for outcome in found.failed:
        print(f"failed: {outcome.cell.folder}: {outcome.error}", file=sys.stderr)
    return FAILED if found.failed else OK


def _search(config: CompareConfig, options: argparse.Namespace) -> int:
    from mmtune.compare.choosing import as_yaml
    from mmtune.compare.running import search
    from mmtune.compare.table import search_lines

    found = search(
        config,
        options.runs,
        _tell,
        overwrite=options.overwrite,
        apart=not options.one_process,
    )
    header, lines = search_lines(found)
    table = new_table(*header, title=f"{config.name}: learning rates", right=True)
    for line in lines:
        table.add_row(*line)
    _print(table)
    print(f"into {config.source}:\n\n{as_yaml(found)}")
    errors = {f"{c.method}, lr {rate:g}": e for c in found for rate, e in c.errors.items()}
    for name, error in errors.items():
        print(f"failed: {name}: {error}", file=sys.stderr)
    return FAILED if errors else OK


def _eval(options: argparse.Namespace) -> None:
    from mmtune.config import load_config
    from mmtune.finetuning import evaluate, first_process
    from mmtune.runs import RunFolder, save_predictions

    path, adapter = Path(options.run), options.adapter
    if path.is_dir():
        folder = RunFolder(path)
        folder.check_holds_run()
        config = load_config(folder.config, options.overrides)
        adapter = adapter or folder.adapter
    else:
        config = load_config(options.run, options.overrides)
    found = evaluate(config, adapter, options.split)
    if first_process():
        what = f"{config.model.name} with {adapter}" if adapter else f"{config.model.name}"
        _print(evaluation_table(f"{what}, {options.split} split", found))
        if options.predictions is not None:
            count = save_predictions(found, options.predictions)
            print(f"{count:,} predictions: {options.predictions}")


def _params(options: argparse.Namespace) -> None:
    from mmtune.config import load_config
    from mmtune.finetuning import load_model, wrap

    config = load_config(options.config, options.overrides)
    model, groups = wrap(config, load_model(config))
    _print(parameter_table(config, model, groups))


def _merge(options: argparse.Namespace) -> None:
    from mmtune.config import load_config
    from mmtune.merging import merge_run
    from mmtune.runs import RunFolder

    folder = RunFolder(options.run)
    folder.check_holds_run()
    difference = merge_run(load_config(folder.config), folder.adapter, options.out)
    print(f"stock weights in {options.out}; outputs differ by {difference:.1e} relative")


def _show(options: argparse.Namespace) -> int:
    shown = options.show(options)
    for table in shown.tables:
        _print(table, piped=180 if shown.wide else 120)
    for line in shown.lines:
        print(line)
    for line in shown.errors:
        print(line, file=sys.stderr)
    if shown.then is not None:
        sys.stdout.flush()
        shown.then()
    return shown.code


def _list(options: argparse.Namespace) -> None:
    from mmtune.reference.showing import listed
    from mmtune.tables import matrix

    if not (options.matrix or options.what):
        names = ", ".join(LISTED)
        raise ValueError(f"name what to list: {names}, a method or an editor, or --matrix.")
    for part in matrix() if options.matrix else listed(options.what, LISTED):
        _print(part, piped=180 if options.matrix else 120)


def _print_costs(results: Results) -> None:
    from mmtune.report.numbers import facts

    for fact in facts(results):
        print(f"{fact.label}: {fact.value} ({fact.detail})")


def _print(part: Table | Text | str, piped: int = 120) -> None:
    from rich.console import Console

    # A pipe or a log has no width (80 would fold tables); texts hold brackets that are no markup.
    width = None if Console().is_terminal else piped
    Console(width=width, markup=False, highlight=False).print(part)


def _tell(text: str) -> None:
    from mmtune.finetuning import first_process

    if first_process():
        print(f"· {text}", file=sys.stderr, flush=True)


def _quieten_libraries(debug: bool) -> None:
    """Progress bars and advice of libraries, or of other processes, would drown ours."""
    if os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("TQDM_DISABLE", "1")
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _is_override(text: str) -> bool:
    return "=" in text and not text.startswith("-")


def _is_user_error(error: Exception) -> bool:
    """Errors that our libraries raise for what a user can mend (they say how)."""
    if isinstance(error, ValueError | OSError | ImportError):
        return True
    return any(
        cls.__module__.startswith("mmtune") or "no backbone describes" in str(error)
        for cls in type(error).__mro__
    )


if __name__ == "__main__":
    sys.exit(main())
