"""The data sets that ship, by name: one, or several as `clipart-{animals,food}`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmtune.data.options import SourceOptions
from mmtune.data.readers import expand_braces, parquet
from mmtune.data.records import DataError, Problem, Question, Record, image_of


def read(source: SourceOptions, role: str) -> Iterator[Record | Question | Problem]:
    """Yield the records or questions of one split of shipped data sets, in order of their names.

    Raises:
        DataError: no such data set or split; the message lists those there are.
    """
    import pyarrow.parquet as pq

    for path in files(source, role):
        if "questions" in pq.read_schema(path).names:
            yield from _questions(path)
        else:
            yield from parquet.read_file(str(path), str(path.parent))


def _questions(path: Path) -> Iterator[Question]:
    """The questions of a file with one row an image; the image's other columns are fields."""
    import pyarrow.parquet as pq

    number = 0
    for batch in pq.ParquetFile(path).iter_batches(256):
        for row in batch.to_pylist():
            image = image_of(row.pop("image"), str(path.parent))
            asked, identity = row.pop("questions"), row.pop("id")
            for item in asked:
                yield Question(
                    image,
                    item["question"],
                    (item["answer"],),
                    item["id"],
                    f"{path}, row {number}, question {item['id']}",
                    {**row, "kind": item["kind"], "image_id": identity},
                )
            number += 1


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
