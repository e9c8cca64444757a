"""The one schema inside: an image or video with its captions, or with a question about it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LISTED = 20  # problems that one exception names


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the data.

    Attributes:
        where: file and record, or line.
        reason: its kind, the same text for all problems of that kind (they are counted by it).
        text: what exactly.
    """

    where: str
    reason: str
    text: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f": {self.text}" if self.text else "")


class DataError(ValueError):
    """Data that cannot be used; the message lists up to 20 problems and their number.

    Attributes:
        problems: all of them.
    """

    def __init__(self, problems: Sequence[Problem], advice: str = "") -> None:
        self.problems = list(problems)
        counts = counted(problems)
        lines = [f"{len(self.problems)} problem(s) in the data ({counts}):"]
        lines += [f"  {p}" for p in self.problems[:LISTED]]
        if len(self.problems) > LISTED:
            lines.append(f"  and {len(self.problems) - LISTED} more")
        super().__init__("\n".join(lines + ([advice] if advice else [])))


def counted(problems: Sequence[Problem]) -> str:
    """Problems by reason, most frequent first: "12 missing image, 3 no caption"."""
    return ", ".join(f"{n} {r}" for r, n in Counter(p.reason for p in problems).most_common())


def listed(problems: Sequence[Problem]) -> str:
    """The first 20 problems in one line, for a log."""
    more = "; ..." if len(problems) > LISTED else ""
    return "; ".join(map(str, problems[:LISTED])) + more


class ImageProblem(ValueError):
    """An image or video that cannot be used: the reason (same text for all of a kind), and what."""

    def __init__(self, reason: str, text: str = "") -> None:
        self.reason, self.text = reason, text
        super().__init__(f"{reason}: {text}" if text else reason)


@dataclass(frozen=True)
class ImageFile:
    """An image in a file below `root`; `name` may not lead out of it."""

    root: str
    name: str

    def path(self) -> str:
        """The file. Raises ImageProblem: missing, or outside the root."""
        return _inside(self.root, self.name, "image")

    def read(self) -> bytes:
        """The file's bytes. Raises ImageProblem: missing, unreadable, or outside the root."""
        path = self.path()
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise ImageProblem("unreadable image", f"{self.name!r}: {error}") from None


def _inside(root: str, name: str, what: str, folder: bool = False) -> str:
    """The real path of the file `name` below `root`, both followed through symbolic links.

    With `folder`, it may be a folder.
    """
    try:
        root = os.path.realpath(root)
        path = os.path.realpath(os.path.join(root, name))
        inside = bool(name) and os.path.commonpath([root, path]) == root
    except ValueError as error:
        raise ImageProblem(f"missing {what}", f"{name!r}: {error}") from None
    if not inside:
        raise ImageProblem(
            f"{what} outside root",
            f"{name!r} leads (directly or by a symbolic link) out of {root}. Set `images` to the "
            f"folder that holds the {what}s.",
        )
    if not os.path.isfile(path) and not (folder and os.path.isdir(path)):
        raise ImageProblem(f"missing {what}", f"no file {name!r} in {root}")
    return path


@dataclass(frozen=True)
class ImageBytes:
    """An encoded image held in memory."""

    data: bytes = field(repr=False)

    def read(self) -> bytes:
        """The bytes."""
        return self.data


@dataclass(frozen=True)
class TarMember:
    """An image inside an uncompressed tar file, at a byte offset."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The member's bytes. Raises ImageProblem where the shard ends before them."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise ImageProblem("unreadable image", f"{self.path}: {error}") from None
        if len(data) < self.size:
            raise ImageProblem("truncated image", f"{self.path} ends inside it")
        return data


@dataclass(frozen=True)
class DatasetCell:
    """An image in a row of a `datasets.Dataset` whose image column is not decoded."""

    dataset: Any = field(repr=False, compare=False)
    row: int
    column: str
    root: str | None

    def read(self) -> bytes:
        """The cell's bytes, or those of the file that it names below `root`."""
        return image_of(self.dataset[self.row][self.column], self.root).read()


ImageRef = ImageFile | ImageBytes | TarMember | DatasetCell


@dataclass(frozen=True)
class VideoFile:
    """A video in a file, or a folder of its frames, below `root`; `name` may not lead out of it."""

    root: str
    name: str

    def path(self) -> str:
        """The file or folder. Raises ImageProblem: missing, or outside the root."""
        return _inside(self.root, self.name, "video", folder=True)


MediaRef = ImageRef | VideoFile


def image_of(cell: Any, root: str | None) -> ImageFile | ImageBytes:
    """What an image cell of a table holds: bytes, a path, or {bytes, path}.

    Args:
        cell: the cell.
        root: folder that paths are relative to; None trusts absolute paths (a `datasets` cache).

    Raises:
        ImageProblem: neither bytes nor a path.
    """
    if isinstance(cell, Mapping):
        data = cell.get("bytes")
        cell = data if data is not None else cell.get("path")
    if isinstance(cell, bytes | bytearray | memoryview):
        return ImageBytes(bytes(cell))
    if isinstance(cell, str) and cell:
        return ImageFile(root if root is not None else os.path.dirname(cell) or ".", cell)
    raise ImageProblem("missing image", f"expected bytes or a path, got {type(cell).__name__}")


@dataclass(frozen=True)
class Record:
    """One image or video with its captions.

    Attributes:
        image: where the encoded image is, whose `read()` gives its bytes; or the video.
        captions: at least one, stripped, none empty.
        id: what the source calls it.
        where: file and record, or line, for messages.
        fields: everything else that the source says about it.
    """

    image: MediaRef
    captions: tuple[str, ...]
    id: str
    where: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """One question about an image or video.

    Attributes:
        image: as in `Record`.
        question: stripped, not empty.
        answers: as the annotators gave them, one each, repeats kept (VQAv2: ten); stripped, none
            empty. Empty where the source has none to give (a hidden test split).
        id: what the source calls the question.
        where: file and record, or line, for messages.
        fields: everything else that the source says about it.
    """

    image: MediaRef
    question: str
    answers: tuple[str, ...]
    id: str
    where: str
    fields: Mapping[str, Any] = field(default_factory=dict)


def captions_of(value: Any, where: str) -> tuple[str, ...] | Problem:
    """A caption, or a list of captions, as a tuple; what is wrong with it otherwise."""
    items = [value] if isinstance(value, str) else value
    if items is None:
        return Problem(where, "record without caption")
    if not isinstance(items, list | tuple) or not all(isinstance(c, str) for c in items):
        return Problem(
            where,
            "malformed record",
            f"expected a caption or a list of captions, got {str(value)[:60]!r}",
        )
    captions = tuple(c.strip() for c in items if c.strip())
    return captions or Problem(where, "record without caption")


def answers_of(value: Any, where: str, field: str) -> tuple[str, ...] | Problem:
    """An answer, or a list of answers, as a tuple; what is wrong with `field` otherwise."""
    items = [value] if isinstance(value, str) else value
    if items is None:
        return Problem(where, "question without answers", f"it has no field {field!r}")
    if not isinstance(items, list | tuple) or not all(isinstance(a, str) for a in items):
        expected = f"{field} is {str(value)[:60]!r}, expected a text or a list of texts"
        return Problem(where, "malformed record", expected)
    answers = tuple(a.strip() for a in items if a.strip())
    return answers or Problem(where, "question without answers", f"{field} is empty")
