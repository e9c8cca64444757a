"""The data sets that ship, by name: one, or several as `clipart-{animals,food}`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from mmtune.data.options import SourceOptions
from mmtune.data.readers import expand_braces, parquet
from mmtune.data.records import DataError, Problem, Record


def read(source: SourceOptions, role: str) -> Iterator[Record | Problem]:
    """Yield the records of one split of shipped data sets, in the order of their names.

    Raises:
        DataError: no such data set or split; the message lists those there are.
    """
    paths = files(source, role)
    return itertools.chain.from_iterable(
        parquet.read_file(str(path), str(path.parent)) for path in paths
    )


def files(source: SourceOptions, role: str) -> list[Path]:
    """The parquet file of each data set that `source.name` means."""
    from mmtune import zoo

    found = []
    for name in expand_braces(str(source.name)):
        try:
            found.append(Path(zoo.data_path(name, source.split or role)))
        except LookupError as error:
            problem = Problem(f"zoo:{name}", "not in the zoo", str(error.args[0]))
            raise DataError([problem]) from None
    return found
