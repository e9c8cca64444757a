"""BLIP's flat JSON of questions: [{"image", "question", "answer": text or list, "question_id"?}].

`dataset` ("vqa" or "vg") is kept in the fields; a test file may leave `answer` out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmtune.data.options import SourceOptions
from mmtune.data.readers.json_files import image_root, load_json, question_record, wrong_shape
from mmtune.data.records import ImageFile, Problem, Question


def read(source: SourceOptions, role: str) -> Iterator[Question | Problem]:
    """Yield one question per mapping; without an id of its own it is numbered from 0."""
    path = str(source.path)
    document = load_json(path)
    if not isinstance(document, list):
        raise wrong_shape(path, "a list of {image, question, answer} (BLIP's flat JSON)", document)
    root = image_root(source.images, path)
    for number, item in enumerate(document):
        yield _question(item, root, f"{path}, record {number}", number, role)


def _question(item: Any, root: str, where: str, number: int, role: str) -> Question | Problem:
    if not isinstance(item, dict):
        return Problem(where, "malformed record", f"expected a mapping, got {item!r:.60}")
    name = item.get("image")
    if not isinstance(name, str):
        return Problem(where, "malformed record", f"image is {name!r:.60}, expected a path")
    return question_record(item, ImageFile(root, name), where, number, role, ("image",))
