"""Flickr30k: Karpathy's JSON, or `results.csv` with the columns image, comment_number, comment.

The released CSV is separated by "|" and holds a row without its last separator; other copies use a
comma. A column `split` is used where there is one.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator

from mmtune.data.options import SourceOptions
from mmtune.data.readers import karpathy
from mmtune.data.readers.blip import merged
from mmtune.data.readers.json_files import image_root, read_text
from mmtune.data.records import DataError, ImageFile, Problem, Record, captions_of

IMAGE, CAPTION = ("image", "image_name", "filename"), ("comment", "caption")


def read(source: SourceOptions, role: str) -> Iterator[Record | Problem]:
    """Yield one record per image with its captions in file order."""
    path = str(source.path)
    if path.endswith(".json"):
        return karpathy.read(source, role)
    lines = read_text(path).splitlines()
    header = lines[0] if lines else ""
    bar = "|" in header
    names = [name.strip().lower() for name in header.split("|" if bar else ",")]
    image = next((n for n in IMAGE if n in names), None)
    caption = next((n for n in CAPTION if n in names), None)
    if image is None or caption is None:
        text = f"expected a header image|comment_number|comment, got {header[:80]!r}"
        raise DataError([Problem(f"{path}, line 1", "not the format it says", text)])
    rows = csv.reader(
        lines[1:], delimiter="|" if bar else ",", quoting=csv.QUOTE_NONE if bar else 0
    )
    root = image_root(source.images, path)
    columns = {"image": names.index(image), "caption": names.index(caption)}
    if "split" in names:
        columns["split"] = names.index("split")
    elif source.split:
        text = f"split {source.split!r} is asked for, but there is no such column"
        raise DataError([Problem(path, "no such split", text)])
    return iter(merged(_rows(rows, path, root, columns, source.split or role, len(names))))


def _rows(
    rows: Iterator[list[str]],
    path: str,
    root: str,
    columns: dict[str, int],
    split: str,
    width: int,
) -> Iterator[Record | Problem]:
    for number, row in enumerate(rows, start=2):
        where = f"{path}, line {number}"
        if not row:
            continue
        if len(row) != width:
            yield Problem(where, "malformed record", f"{len(row)} fields, expected {width}")
            continue
        if "split" in columns and row[columns["split"]].strip() != split:
            continue
        name = row[columns["image"]].strip()
        captions = captions_of(row[columns["caption"]], where)
        yield (
            captions
            if isinstance(captions, Problem)
            else Record(ImageFile(root, name), captions, name, where)
        )
