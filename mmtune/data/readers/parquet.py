"""Parquet: an image column ({bytes, path}, bytes, or a path) and a caption column (text or list).

The table, encoded images included, is held in memory; for more than fits, use `datasets`.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmtune.data.options import SourceOptions
from mmtune.data.readers import matching_files
from mmtune.data.readers.columns import CAPTIONS, IMAGES, caption_column, image_column
from mmtune.data.readers.json_files import image_root
from mmtune.data.records import (
    DataError,
    ImageProblem,
    Problem,
    Record,
    captions_of,
    image_of,
)


def read(source: SourceOptions, role: str) -> Iterator[Record | Problem]:
    """Yield one record per row of the file, or of every *.parquet of a folder or pattern."""
    for path in matching_files(source, (".parquet",)):
        yield from read_file(path, image_root(source.images, path))


def read_file(path: str, root: str) -> Iterator[Record | Problem]:
    """Yield one record per row of a parquet file. Raises DataError where it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError([Problem(path, "not the format it says", f"no parquet: {error}")]) from None
    names = table.schema_arrow.names
    image, caption = image_column(names), caption_column(names)
    if image is None or caption is None:
        text = (
            f"expected an image column ({', '.join(IMAGES)}) and a caption column "
            f"({', '.join(CAPTIONS)}), got {', '.join(names)}"
        )
        raise DataError([Problem(path, "not the format it says", text)])
    row = 0
    try:
        for batch in table.iter_batches(256):
            for item in batch.to_pylist():
                yield _record(item, image, caption, root, f"{path}, row {row}", row)
                row += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError([Problem(f"{path}, row {row}", "damaged parquet", str(error))]) from None


def _record(
    item: dict, image: str, caption: str, root: str, where: str, row: int
) -> Record | Problem:
    captions = captions_of(item[caption], where)
    if isinstance(captions, Problem):
        return captions
    try:
        ref = image_of(item[image], root)
    except ImageProblem as error:
        return Problem(where, error.reason, error.text)
    rest = {k: v for k, v in item.items() if k not in (image, caption)}
    identity = item.get("id", item.get("image_id"))
    return Record(ref, captions, str(row if identity is None else identity), where, rest)
