"""Readers of the formats that people have: one file each, all yield the one schema."""

from __future__ import annotations

import glob
import importlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from mmtune.data.options import SourceOptions
from mmtune.data.records import DataError, Problem, Question, Record

Reader = Callable[[SourceOptions, str], Iterator[Record | Question | Problem]]


def read(source: SourceOptions, role: str = "train") -> Iterator[Record | Question | Problem]:
    """Read a source lazily; images are not opened yet.

    Args:
        source: what to read.
        role: train, val or test: the split where `source.split` is None and the format has splits.

    Yields:
        A record or question, or what is wrong with one.

    Raises:
        DataError: a file that is missing, or is not what it says.
    """
    reader: Reader = importlib.import_module(f"mmtune.data.readers.{source.format}").read
    return itertools.islice(reader(source, role), source.limit)


def source_files(source: SourceOptions, role: str = "train") -> list[str]:
    """The files (not the images) that a source reads, for the run's manifest."""
    if source.format == "zoo":
        from mmtune.data.readers import zoo

        return [str(path) for path in zoo.files(source, role)]
    if source.format == "synthetic":
        return []
    path = Path(str(source.path))
    if path.is_file():
        return [str(path), *([source.answers] if source.answers else [])]
    if source.format == "datasets":
        return []
    found = [f for pattern in expand_braces(str(source.path)) for f in glob.glob(pattern)]
    listed = [f for p in ("metadata.*", "*.parquet", "*.tar*") for f in path.glob(p)]
    return sorted(f for f in [*found, *map(str, listed)] if Path(f).is_file())


def matching_files(source: SourceOptions, endings: tuple[str, ...]) -> list[str]:
    """The files that `source.path` means: a file, a folder, or a pattern with *, {a,b}, {00..12}.

    Raises:
        DataError: no such file; every member of a brace pattern without * must exist.
    """
    found: list[str] = []
    missing: list[Problem] = []
    for pattern in expand_braces(str(source.path)):
        if Path(pattern).is_dir():
            new = sorted(str(p) for p in Path(pattern).iterdir() if p.name.endswith(endings))
        elif Path(pattern).is_file():
            new = [pattern]
        else:
            new = sorted(glob.glob(pattern))
        if not new:
            missing.append(Problem(pattern, "missing file", f"expected {' or '.join(endings)}"))
        found += new
    if missing:
        raise DataError(missing, "Check the path in the config.")
    return found


def expand_braces(pattern: str) -> list[str]:
    """Expand {first..last} and {one,other}: a-{00..02}.tar -> a-00.tar, a-01.tar, a-02.tar."""
    head, opened, rest = pattern.partition("{")
    body, closed, tail = rest.partition("}")
    if not opened or not closed:
        return [pattern]
    first, dots, last = body.partition("..")
    if dots and first.isdigit() and last.isdigit():
        step = 1 if int(first) <= int(last) else -1
        numbers = range(int(first), int(last) + step, step)
        choices = [str(n).zfill(len(first)) for n in numbers]
    else:
        choices = body.split(",")
    return [f"{head}{choice}{end}" for choice in choices for end in expand_braces(tail)]
