"""webdataset: tar shards; members with the same name up to the first dot are one record.

Images are .jpg, .jpeg, .png or .webp; captions are a .txt, or "caption" and its kin in a .json.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from mmtune.data.options import SourceOptions
from mmtune.data.readers import matching_files
from mmtune.data.readers.columns import caption_column
from mmtune.data.records import (
    DataError,
    ImageBytes,
    Problem,
    Record,
    TarMember,
    captions_of,
)

IMAGES = ("jpg", "jpeg", "png", "webp")
ENDINGS = (".tar", ".tar.gz", ".tgz")


def read(source: SourceOptions, role: str) -> Iterator[Record | Problem]:
    """Yield the records of every shard; members of a record are neighbours in a shard."""
    for path in matching_files(source, ENDINGS):
        yield from _shard(path)


def _shard(path: str) -> Iterator[Record | Problem]:
    key, group = "", {}
    try:
        with tarfile.open(path) as tar:
            packed = not _plain(path)
            for member in tar:
                name = PurePosixPath(member.name)
                if not member.isfile() or name.name.startswith("."):
                    continue
                stem, _, ending = name.name.partition(".")
                this = str(name.parent / stem)
                if this != key and group:
                    yield _record(path, key, group)
                    group = {}
                key = this
                group[ending.lower()] = _content(tar, member, path, ending.lower(), packed)
    except (tarfile.TarError, OSError, EOFError) as error:
        if not key:
            raise DataError([Problem(path, "not the format it says", f"no tar: {error}")]) from None
        if group:
            yield _record(path, key, group)
            group = {}
        yield Problem(path, "damaged shard", f"{error}, after record {key!r}")
    if group:
        yield _record(path, key, group)


def _plain(path: str) -> bool:
    """Whether a tar file is uncompressed, so that members can be read by offset."""
    with open(path, "rb") as file:
        return file.read(2) != b"\x1f\x8b"


def _content(
    tar: tarfile.TarFile, member: tarfile.TarInfo, path: str, ending: str, packed: bool
) -> TarMember | bytes | None:
    if ending in IMAGES and not packed:
        return TarMember(path, member.offset_data, member.size)
    if ending in (*IMAGES, "txt", "json"):
        file = tar.extractfile(member)
        return file.read() if file is not None else None
    return None


def _record(path: str, key: str, group: dict[str, Any]) -> Record | Problem:
    where = f"{path}, record {key!r}"
    image = next((group[e] for e in IMAGES if group.get(e) is not None), None)
    if image is None:
        return Problem(
            where, "missing image", f"its members end in {', '.join(group) or 'nothing'}"
        )
    fields: dict[str, Any] = {}
    value: Any = None
    try:
        if group.get("json") is not None:
            fields = json.loads(group["json"].decode("utf-8"))
            if not isinstance(fields, dict):
                return Problem(where, "malformed record", "its json is no mapping")
            value = fields.get(caption_column(fields) or "")
        if group.get("txt") is not None:
            value = group["txt"].decode("utf-8")
    except ValueError as error:
        return Problem(where, "malformed record", str(error))
    captions = captions_of(value, where)
    if isinstance(captions, Problem):
        return captions
    ref = image if isinstance(image, TarMember) else ImageBytes(image)
    return Record(ref, captions, key, where, fields)
