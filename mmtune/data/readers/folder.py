"""A folder of images with `metadata.jsonl`: {"file_name": path, "text" | "caption" | "captions"}.

`datasets` calls this layout imagefolder. Splits are subfolders: `<path>/<split>/metadata.jsonl`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmtune.data.options import SourceOptions
from mmtune.data.readers.columns import CAPTIONS
from mmtune.data.readers.json_files import file_record, json_lines
from mmtune.data.records import DataError, Problem, Record


def read(source: SourceOptions, role: str) -> Iterator[Record | Problem]:
    """Yield one record per line of metadata.jsonl."""
    path = _metadata(source, role)
    root = source.images if source.images is not None else str(path.parent)
    for where, item in json_lines(str(path)):
        if isinstance(item, Problem):
            yield item
        else:
            yield file_record(item, root, where, "file_name", CAPTIONS, "id")


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
