"""A folder of images with `metadata.jsonl`: {"file_name": path, "text" | "caption" | "captions"}.

`datasets` calls this layout imagefolder. Splits are subfolders: `<path>/<split>/metadata.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from mmtune.data.options import SourceOptions
from mmtune.data.readers.columns import caption_column
from mmtune.data.readers.json_files import read_text
from mmtune.data.records import DataError, ImageFile, Problem, Record, captions_of


def read(source: SourceOptions, role: str) -> Iterator[Record | Problem]:
    """Yield one record per line of metadata.jsonl."""
    path = _metadata(source, role)
    root = source.images if source.images is not None else str(path.parent)
    for number, line in enumerate(read_text(str(path)).split("\n"), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            yield Problem(where, "not JSON", str(error))
            continue
        yield _record(item, root, where)


def _metadata(source: SourceOptions, role: str) -> Path:
    folder = Path(str(source.path))
    if folder.is_file():
        return folder
    candidates = [folder / (source.split or role) / "metadata.jsonl"]
    if source.split is None:
        candidates.append(folder / "metadata.jsonl")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    text = f"none of {', '.join(map(str, candidates))}"
    raise DataError([Problem(str(folder), "missing file", text)])


def _record(item: object, root: str, where: str) -> Record | Problem:
    if not isinstance(item, dict):
        return Problem(where, "malformed record", f"expected a mapping, got {item!r:.60}")
    name = item.get("file_name")
    if not isinstance(name, str):
        return Problem(where, "malformed record", f"file_name is {name!r:.60}, expected a path")
    column = caption_column(item)
    captions = captions_of(item[column] if column else None, where)
    if isinstance(captions, Problem):
        return captions
    rest = {k: v for k, v in item.items() if k not in ("file_name", column)}
    return Record(ImageFile(root, name), captions, str(item.get("id", name)), where, rest)
