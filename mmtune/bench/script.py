"""A measurement as a script: settings are options, what is found is a table and numbers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmtune.field_options import add_field_options
from mmtune.runs import write_text


def main(
    name: str,
    description: str | None,
    settings: type,
    measure: Callable[[Any], Any],
    table: Callable[[Any], str],
    arguments: Sequence[str] | None = None,
) -> None:
    """Measure, print the table, and write it with the numbers where --out says.

    Args:
        name: of the module in this package, and of the files.
        description: what --help says.
        settings: a dataclass; each field is an option.
        measure: settings -> a dataclass of what is found.
        table: what is found -> markdown.
        arguments: of the command line; None means the process's.
    """
    parser = argparse.ArgumentParser(
        f"python -m mmtune.bench.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_field_options(parser, settings)
    parser.add_argument("--out", type=Path, help=f"folder of {name}.md and {name}.json")
    given = vars(parser.parse_args(arguments))
    out = given.pop("out")
    found = measure(settings(**given))
    text = table(found) + "\n"
    sys.stdout.write(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / f"{name}.md", text)
        write_text(out / f"{name}.json", json.dumps(asdict(found), indent=2))
