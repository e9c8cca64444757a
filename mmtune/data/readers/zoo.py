"""The data sets that ship with the project, by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmtune.data.options import SourceOptions
from mmtune.data.readers import parquet
from mmtune.data.records import DataError, Problem, Record


def read(source: SourceOptions, role: str) -> Iterator[Record | Problem]:
    """Yield the records of one split of a shipped data set.

    Raises:
        DataError: no such data set or split; the message lists those there are.
    """
    from mmtune import zoo

    try:
        path = Path(zoo.data_path(str(source.name), source.split or role))
    except LookupError as error:
        where = f"zoo:{source.name}"
        raise DataError([Problem(where, "not in the zoo", str(error.args[0]))]) from None
    return parquet.read_file(str(path), str(path.parent))
