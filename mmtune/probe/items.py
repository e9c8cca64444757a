"""Questions that models are compared by, one JSON line each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmtune.data.records import DataError, ImageFile, Problem
from mmtune.runs import write_text

Kind = Literal["choice", "yes-no", "text", "words"]
YES, NO = "yes", "no"


@dataclass(frozen=True)
class Region:
    """A place in an image that a question is about.

    Attributes:
        box: left, top, right, bottom, as parts of width and height, in [0, 1].
        label: what is there, for people.
        image: number of the image.
    """

    box: tuple[float, float, float, float]
    label: str = ""
    image: int = 0


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: unique in its file.
        images: names of files below the set's folder of images; none for a question about no image.
        question: the text, without choices and without a word on how to answer.
        answer: the right answer; of choices, its text.
        category, subcategory: the ability that it asks for.
        choices: the answers to choose from, in the order in which they are shown.
        regions: what visual referring points at; none means that it has nothing to point at.
        pair_id: of items that belong together: a question and its flip, paraphrases, orders of
            choices.
        relation: what the items of a pair have to do with each other: "flip" (their answers
            differ), "same" (their answers are the same), or empty.
        exemplar_pool: items that serve as examples for this one; empty means those of its category.
        answers: further right answers, for texts.
        fields: what else the source says.
    """

    id: str
    images: tuple[str, ...]
    question: str
    answer: str
    category: str
    subcategory: str = ""
    choices: tuple[str, ...] = ()
    regions: tuple[Region, ...] = ()
    pair_id: str = ""
    relation: str = ""
    exemplar_pool: str = ""
    answers: tuple[str, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """How it is answered: by a choice, by yes or no, by exact text (OCR), or in words."""
        if self.choices:
            return "choice"
        if self.answer.strip().lower() in (YES, NO):
            return "yes-no"
        return "text" if self.fields.get("exact_text") else "words"

    def as_json(self) -> dict[str, Any]:
        """As JSON has it; fields at their defaults are left out."""
        every = dataclasses.asdict(self)
        return {name: value for name, value in every.items() if value not in ("", (), {})}


@dataclass(frozen=True)
class ItemSet:
    """Items with the folder of their images.

    Attributes:
        name: of the set.
        items: in the order of the file.
        images: the folder.
        note: what has to be said of it wherever its numbers are shown, such as that it was made.
    """

    name: str
    items: tuple[Item, ...]
    images: Path
    note: str = ""

    def picture(self, item: Item, number: int = 0) -> ImageFile:
        """An image of an item."""
        return ImageFile(str(self.images), item.images[number])


Found = tuple[str, Item | Problem]  # where it stands, and what stands there


def item_of(raw: Mapping[str, Any], where: str) -> Item | Problem:
    """An item of a JSON object, or what is wrong with it."""
    for name in ("id", "question", "answer", "category"):
        if not isinstance(raw.get(name), (str, int)) or not str(raw[name]).strip():
            return Problem(where, f"no {name}", f"expected text, got {raw.get(name)!r}")
    unknown = set(raw) - {f.name for f in dataclasses.fields(Item)}
    values = {key: value for key, value in raw.items() if key not in unknown}
    values["fields"] = {**raw.get("fields", {}), **{key: raw[key] for key in sorted(unknown)}}
    for name in ("images", "choices", "answers"):
        given = values.get(name, ())
        if isinstance(given, str) or not all(isinstance(one, str) for one in given):
            return Problem(where, f"{name} is no list of texts", repr(given))
        values[name] = tuple(given)
    regions = []
    for one in values.get("regions", ()):
        box = one.get("box") if isinstance(one, Mapping) else None
        if not _is_box(box):
            return Problem(
                where,
                "bad region",
                f"expected a box [left, top, right, bottom] in 0..1, got {one!r}",
            )
        regions.append(Region(tuple(box), one.get("label", ""), one.get("image", 0)))  # type: ignore
    for name in ("id", "question", "answer", "category"):
        values[name] = str(values[name])
    item = Item(**{**values, "regions": tuple(regions)})
    if item.choices and item.answer not in item.choices:
        return Problem(where, "answer among no choices", f"{item.answer!r} of {item.choices}")
    if any(region.image >= len(item.images) for region in item.regions):
        return Problem(where, "region of no image", f"there are {len(item.images)}")
    return item


def read_items(path: str | Path, images: str | Path | None = None) -> ItemSet:
    """Read a set of JSON lines.

    Args:
        path: the file; `note.txt` beside it is the set's note.
        images: folder that names of images are relative to; None means the file's.

    Raises:
        DataError: lines that are no items, two of one id, or none at all.
    """
    file = Path(path)
    found: list[Found] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            where = f"{file}:{number}"
            found.append((where, _item_in(line, where)))
    items = checked_items(found, file)
    note = file.with_name("note.txt")
    text = note.read_text(encoding="utf-8").strip() if note.exists() else ""
    name = file.parent.name if file.stem == "items" else file.stem
    return ItemSet(name, items, Path(images or file.parent), text)


def checked_items(found: Iterable[Found], source: Path) -> tuple[Item, ...]:
    """The items of a set, in order.

    Args:
        found: where each stands, and what stands there.
        source: the file or folder of the set.

    Raises:
        DataError: every problem, two items of one id, or none at all.
    """
    items: dict[str, Item] = {}
    problems: list[Problem] = []
    for where, one in found:
        if isinstance(one, Item) and one.id in items:
            one = Problem(where, "id twice", one.id)
        if isinstance(one, Problem):
            problems.append(one)
        else:
            items[one.id] = one
    if problems or not items:
        raise DataError(problems or [Problem(str(source), "no item")])
    return tuple(items.values())


def write_items(path: Path, items: Iterable[Item]) -> None:
    """Write a set of JSON lines, whole or not at all."""
    lines = [json.dumps(item.as_json(), ensure_ascii=False) for item in items]
    write_text(path, "".join(line + "\n" for line in lines))


def _item_in(line: str, where: str) -> Item | Problem:
    try:
        raw = json.loads(line)
    except ValueError as error:
        return Problem(where, "no JSON", str(error))
    return item_of(raw, where) if isinstance(raw, dict) else Problem(where, "no object")


def _is_box(box: Any) -> bool:
    if not isinstance(box, Sequence) or len(box) != 4:
        return False
    if not all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in box):
        return False
    return box[0] < box[2] and box[1] < box[3]
