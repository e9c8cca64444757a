"""JSON that is what it says, or a DataError with file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmtune.data.records import (
    DataError,
    ImageFile,
    MediaRef,
    Problem,
    Question,
    Record,
    answers_of,
    captions_of,
)

IDS = ("question_id", "id")  # keys of a question's id


def load_json(path: str) -> Any:
    """Parse a JSON file. Raises DataError: missing, not UTF-8, or not JSON (with the line)."""
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}"
        raise DataError([Problem(where, "not JSON", error.msg)]) from None
    except RecursionError:
        raise DataError([Problem(path, "not JSON", "nested too deeply")]) from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError([Problem(path, "not JSON", str(error))]) from None


def read_text(path: str) -> str:
    """The text of a UTF-8 file (a byte-order mark is allowed). Raises DataError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError([Problem(path, "not UTF-8", str(error))]) from None
    except OSError as error:
        raise DataError([Problem(path, "missing file", error.strerror or str(error))]) from None


def json_lines(path: str) -> Iterator[tuple[str, Any]]:
    """Every line of a JSON lines file that is not empty, as (where, value).

    The value is a Problem where the line is not JSON. Raises DataError as `read_text` does.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                yield where, Problem(where, "not JSON", str(error))


def image_root(images: str | None, path: str) -> str:
    """The folder that image paths are relative to: as given, or that of the file naming them."""
    return images if images is not None else str(Path(path).parent)


def file_record(
    item: object, root: str, where: str, image: str, captions: Sequence[str], identity: str
) -> Record | Problem:
    """The record of one JSON mapping that names an image file, or what is wrong with it.

    Args:
        item: what stands in the file.
        root: folder that image paths are relative to.
        where: names the file and the place in it.
        image: key of the image's path.
        captions: keys of the caption or list of captions; the first that is present is taken.
        identity: key of the id; without one the path is the id.
    """
    if not isinstance(item, dict):
        return Problem(where, "malformed record", f"expected a mapping, got {item!r:.60}")
    name = item.get(image)
    if not isinstance(name, str):
        return Problem(where, "malformed record", f"{image} is {name!r:.60}, expected a path")
    column = next((key for key in captions if key in item), None)
    texts = captions_of(item[column] if column else None, where)
    if isinstance(texts, Problem):
        return texts
    rest = {k: v for k, v in item.items() if k not in (image, column)}
    known = item.get(identity)
    return Record(ImageFile(root, name), texts, str(name if known is None else known), where, rest)


def question_record(
    item: dict[str, Any], media: MediaRef, where: str, number: int, role: str, used: Sequence[str]
) -> Question | Problem:
    """The question of one JSON mapping about an image or video, or what is wrong with it.

    Args:
        item: {"question", "answer": text or list, "question_id"?}; in a test split the answer may
            be missing or empty: it is hidden.
        media: what the question is about.
        where: names the file and the place in it.
        number: of the mapping, its id where it has none.
        role: train, val or test.
        used: keys that say what the question is about.
    """
    text, given = item.get("question"), item.get("answer")
    if not isinstance(text, str) or not text.strip():
        return Problem(where, "malformed record", f"question is {text!r:.60}, expected text")
    hidden = role == "test" and given in (None, "", [])
    answers = () if hidden else answers_of(given, where, "answer")
    if isinstance(answers, Problem):
        return answers
    identity = next((item[key] for key in IDS if item.get(key) is not None), number)
    rest = {k: v for k, v in item.items() if k not in ("question", "answer", *used)}
    return Question(media, text.strip(), answers, str(identity), where, rest)


def wrong_shape(path: str, expected: str, got: Any) -> DataError:
    """The error for JSON of another kind than the format's."""
    if isinstance(got, dict):
        found = f"a mapping with keys {', '.join(map(repr, list(got)[:5]))}"
    else:
        found = f"a {type(got).__name__}"
    return DataError([Problem(path, "not the format it says", f"expected {expected}, got {found}")])
