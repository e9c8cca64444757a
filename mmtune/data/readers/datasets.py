"""Any `datasets` repository with an image and a caption column, or a folder saved to disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmtune.data.options import SourceOptions
from mmtune.data.readers.columns import CAPTIONS, IMAGES, caption_column, image_column
from mmtune.data.records import DataError, DatasetCell, Problem, Record, captions_of

ALIASES = {"val": ("val", "validation", "dev"), "train": ("train",), "test": ("test",)}


def read(source: SourceOptions, role: str) -> Iterator[Record | Problem]:
    """Yield one record per row; images stay on disk until they are asked for."""
    import datasets

    path = str(source.path)
    saved = any((Path(path) / f).is_file() for f in ("state.json", "dataset_dict.json"))
    try:
        whole = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, source.name)
    except Exception as error:  # hub, builder and arrow errors have no common base
        raise DataError(
            [Problem(path, "not a data set", f"{type(error).__name__}: {error}")],
            "Expected a folder of save_to_disk, or a repository that load_dataset can load.",
        ) from None
    data = _split(whole, path, source.split, role)
    image, caption = image_column(data.column_names), caption_column(data.column_names)
    if image is None or caption is None:
        text = (
            f"expected an image column ({', '.join(IMAGES)}) and a caption column "
            f"({', '.join(CAPTIONS)}), got {', '.join(data.column_names)}"
        )
        raise DataError([Problem(path, "not the format it says", text)])
    if isinstance(data.features[image], datasets.Image):
        data = data.cast_column(image, datasets.Image(decode=False))
    # Paths in the cache of load_dataset are absolute and made by it; those in a folder are not.
    root = source.images if source.images is not None else (path if Path(path).exists() else None)
    others = data.remove_columns([image])
    for row in range(len(data)):
        where = f"{path}, row {row}"
        item = others[row]
        captions = captions_of(_texts(item.pop(caption)), where)
        if isinstance(captions, Problem):
            yield captions
            continue
        identity = item.get("id", item.get("image_id"))
        name = str(row if identity is None else identity)
        yield Record(DatasetCell(data, row, image, root), captions, name, where, item)


def _texts(value: Any) -> Any:
    """A caption, or captions; [{"raw": text}] (sentences) as a list of texts."""
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        return [v.get("raw") for v in value]
    return value


def _split(whole: Any, path: str, split: str | None, role: str) -> Any:
    if not hasattr(whole, "keys"):
        if split is not None:
            text = f"split {split!r} is asked for, but the folder holds one data set"
            raise DataError([Problem(path, "no such split", text)])
        return whole
    for name in (split,) if split else ALIASES.get(role, (role,)):
        if name in whole:
            return whole[name]
    text = f"no split {split or role!r}; there are {', '.join(whole.keys())}"
    raise DataError([Problem(path, "no such split", text)])
