"""BLIP's flat JSON: [{"image": path, "caption": text or list, "image_id"?: id}]."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mmtune.data.options import SourceOptions
from mmtune.data.readers.json_files import file_record, image_root, load_json, wrong_shape
from mmtune.data.records import MediaRef, Problem, Record


def read(source: SourceOptions, role: str) -> Iterator[Record | Problem]:
    """Yield one record per image: the training file has one entry per caption."""
    path = str(source.path)
    document = load_json(path)
    if not isinstance(document, list):
        raise wrong_shape(path, "a list of {image, caption} (BLIP's flat JSON)", document)
    root = image_root(source.images, path)
    entries = (
        file_record(item, root, f"{path}, record {number}", "image", ("caption",), "image_id")
        for number, item in enumerate(document)
    )
    return iter(merged(entries))


def merged(entries: Iterator[Record | Problem]) -> list[Record | Problem]:
    """Entries of the same image become one record, in order of first appearance."""
    found: list[Record | Problem] = []
    at: dict[MediaRef, int] = {}
    for entry in entries:
        known = at.get(entry.image) if isinstance(entry, Record) else None
        first = found[known] if known is not None else None
        if known is not None and isinstance(entry, Record) and isinstance(first, Record):
            found[known] = replace(first, captions=first.captions + entry.captions)
            continue
        if isinstance(entry, Record):
            at[entry.image] = len(found)
        found.append(entry)
    return found
