"""Karpathy splits: `dataset_coco.json`, `dataset_flickr30k.json`.

{"images": [{"filename", "filepath"?, "split", "imgid", "cocoid"?, "sentences": [{"raw"}]}]}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmtune.data.options import SourceOptions
from mmtune.data.readers.json_files import image_root, load_json, wrong_shape
from mmtune.data.records import DataError, ImageFile, Problem, Record, captions_of


def read(source: SourceOptions, role: str) -> Iterator[Record | Problem]:
    """Yield the images of one split; "restval" counts as "train" unless `restval` is off."""
    path = str(source.path)
    document = load_json(path)
    if not isinstance(document, dict) or not isinstance(document.get("images"), list):
        raise wrong_shape(path, 'a mapping with a list "images" (Karpathy splits)', document)
    split = source.split or role
    wanted = {split, "restval"} if split == "train" and source.restval else {split}
    images = document["images"]
    known = {str(i.get("split")) for i in images if isinstance(i, dict)}
    if not wanted & known:
        text = f"no image of split {split!r}; there are {', '.join(sorted(known)) or 'none'}"
        raise DataError([Problem(path, "no such split", text)])
    root = image_root(source.images, path)
    for number, item in enumerate(images):
        where = f"{path}, record {number}"
        if not isinstance(item, dict):
            yield Problem(where, "malformed record", f"expected a mapping, got {item!r:.60}")
        elif item.get("split") in wanted:
            yield _record(item, root, where)


def _record(item: dict[str, Any], root: str, where: str) -> Record | Problem:
    filename, folder = item.get("filename"), item.get("filepath") or ""
    if not isinstance(filename, str) or not isinstance(folder, str):
        return Problem(where, "malformed record", f"filename is {filename!r:.60}, expected text")
    sentences = item.get("sentences")
    if not isinstance(sentences, list) or not all(isinstance(s, dict) for s in sentences):
        text = f'expected a list "sentences" of mappings, got {sentences!r:.60}'
        return Problem(where, "record without caption", text)
    captions = captions_of([s.get("raw") for s in sentences], where)
    if isinstance(captions, Problem):
        return captions
    name = f"{folder}/{filename}" if folder else filename
    ids = (item.get(key) for key in ("cocoid", "imgid", "filename"))
    rest = {k: v for k, v in item.items() if k != "sentences"}
    return Record(
        ImageFile(root, name), captions, str(next(i for i in ids if i is not None)), where, rest
    )
