"""Edit records as parquet files that `datasets.load_dataset` reads, pictures inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from editing.datasets import FIELDS, IMAGES

ROWS = 512  # of a file, so that its pictures fit in memory
Pictured = Literal["images", "paths"]


def write_parquet(
    items: Sequence[Mapping[str, Any]], folder: Path, split: str, root: Path, pictured: Pictured
) -> list[Path]:
    """Write SPLIT-00000-of-00002.parquet and so on; the same records give the same bytes.

    Args:
        items: records with the paths of their images.
        folder: where to; it is there.
        split: begins the names.
        root: folder that the paths are relative to.
        pictured: "images" puts the encoded pictures in columns of `datasets.Image`; "paths"
            leaves their paths.

    Raises:
        OSError: an image that cannot be read, a full disk.
    """
    count = max(1, -(-len(items) // ROWS))
    paths = [folder / f"{split}-{at:05d}-of-{count:05d}.parquet" for at in range(count)]
    for at, path in enumerate(paths):
        _write(items[at * ROWS : (at + 1) * ROWS], path, root, pictured)
    return paths


def _write(items: Sequence[Mapping[str, Any]], path: Path, root: Path, pictured: Pictured) -> None:
    from datasets import Dataset, Features, Image, Value
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    text = ("id", *FIELDS)
    columns: dict[str, list[Any]] = {
        name: [_text(item.get(name)) for item in items] for name in text
    }
    kinds: dict[str, Any] = dict.fromkeys(text, Value("string"))
    if pictured == "images":
        for name in IMAGES:
            kinds[name] = Image()
            columns[name] = [_cell(root, item[name]) for item in items]
    table = Dataset.from_dict(columns, features=Features(kinds))
    quiet = are_progress_bars_disabled()
    disable_progress_bars()  # a bar a file tells nothing
    try:
        table.to_parquet(str(path))
    finally:
        if not quiet:
            enable_progress_bars()


def _cell(root: Path, name: str) -> dict[str, Any]:
    return {"bytes": (root / name).read_bytes(), "path": name}


def _text(value: str | None) -> str | None:
    """Parquet has no lone surrogates, which JSON can hold: they become question marks."""
    return None if value is None else value.encode("utf-8", "replace").decode("utf-8")
