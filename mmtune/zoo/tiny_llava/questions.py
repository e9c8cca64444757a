"""Questions about drawings and shapes, their right answers, and the same in other words.

For a drawing, `ask` makes a question of a wanted kind, with a second wording; `alike` finds other
drawings of the same thing, for which the same answer is right. An editing demo needs no more: what
the model answers wrongly is an edit, the second wording and the other drawings measure whether it
carries over, and questions about other rows whether it stays where it belongs.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmtune.zoo.tiny_clip.material import split_table
from mmtune.zoo.tiny_llava.things import Thing, thing_of, things, with_article, words_of

# {this} is a thing with its article, {a} and {b} two of them, {color} and {shape} words.
WORDINGS: dict[str, tuple[str, ...]] = {
    "name": (
        "What is this?",
        "What is in the picture?",
        "What does the picture show?",
        "What is shown here?",
        "What can be seen in the image?",
        "What has been drawn here?",
        "Name what is drawn.",
    ),
    "kind": (
        "What kind of thing is this?",
        "What sort of thing does the picture show?",
        "Which category does the drawing belong to?",
        "What type of thing is in the image?",
        "To which kind of things does this belong?",
    ),
    "presence": (
        "Is there {this} in the picture?",
        "Is this {this}?",
        "Does the image show {this}?",
        "Can you see {this} in the drawing?",
        "Does the picture contain {this}?",
    ),
    "choice": (
        "Is this {a} or {b}?",
        "Which is in the picture, {a} or {b}?",
        "Does the image show {a} or {b}?",
        "What is drawn here: {a} or {b}?",
    ),
    "shape": (
        "What shape is this?",
        "Which shape is in the image?",
        "What is the {color} shape?",
        "What shape does the picture contain?",
    ),
    "color": (
        "What color is the {shape}?",
        "What is the color of the {shape}?",
        "Which color does the shape have?",
        "In what color is the {shape} drawn?",
    ),
    "has-shape": (
        "Is there a {shape}?",
        "Does the image contain a {shape}?",
        "Is a {shape} present?",
        "Can you see a {shape} in the picture?",
    ),
    "has-color": (
        "Is there a {color} shape?",
        "Does the image contain a {color} shape?",
        "Is a {color} shape present?",
        "Is the shape {color}?",
    ),
}
DRAWING_KINDS = ("name", "kind", "presence", "choice")
SHAPE_KINDS = ("shape", "color", "has-shape", "has-color")
# Kinds that hold only few drawings or are no word to ask for are not asked about.
_NO_KIND = frozenset({"timepiece", "holiday", "sign", "nature", "face"})


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes:
        kind: a key of `WORDINGS`.
        text: the question.
        answer: the right one, in lower case.
        rephrased: the same question in other words.
    """

    kind: str
    text: str
    answer: str
    rephrased: str


def drawings(name: str, split: str) -> list[dict[str, Any]]:
    """The rows of a split of `clipart` whose thing is known, each with it under `thing`."""
    rows = split_table(name, split).to_pylist()
    return [row | {"thing": thing} for row in rows if (thing := thing_of(row))]


def shapes(split: str, limit: int = 0) -> list[dict[str, Any]]:
    """The rows of a split of `easy-vqa` whose shape and colour are known; 0 means all."""
    rows = [r for r in split_table("easy-vqa", split).to_pylist() if r["shape"] and r["color"]]
    return rows[: limit or None]


def ask(
    row: Mapping[str, Any], kind: str, draw: random.Random, others: Sequence[Thing]
) -> Question:
    """A question about a row.

    Args:
        row: of `drawings`, or of `shapes` for a kind of `SHAPE_KINDS`.
        kind: a key of `WORDINGS`.
        draw: decides what else is named, and the wordings.
        others: things of other drawings, from which those that are not there are drawn; unused for
            shapes.

    Raises:
        KeyError: an unknown kind.
    """
    if kind in SHAPE_KINDS:
        return _ask_shape(row, kind, draw)
    thing: Thing = row["thing"]
    if kind == "name":
        return _worded(kind, thing.noun, draw)
    if kind == "kind":
        return _worded(kind, thing.kind, draw)
    if kind == "choice":
        other = absent(row, others, draw)
        pair = [thing, other] if draw.random() < 0.5 else [other, thing]
        return _worded(kind, thing.noun, draw, a=pair[0].named, b=pair[1].named)
    there = draw.random() < 0.5
    shown = thing if there else absent(row, others, draw)
    named = shown.named
    if shown.kind not in _NO_KIND and draw.random() < 0.25:
        named = with_article(shown.kind)  # "Is there an animal?"
        there = shown.kind in words_of(row) or shown.kind == thing.kind
    return _worded(kind, "yes" if there else "no", draw, this=named)


def absent(row: Mapping[str, Any], others: Sequence[Thing], draw: random.Random) -> Thing:
    """A thing that neither the title nor the keywords of a row speak of."""
    thing, said = row["thing"], words_of(row)
    for _ in range(100):
        other = draw.choice(others)
        if other.noun not in said and other.noun != thing.noun and other.kind != thing.kind:
            return other
    raise ValueError(f"all of the other things may be in {row['title']!r}: name more of them")


def alike(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> list[int]:
    """Numbers of the other drawings of the same thing: the same questions have the same answers.

    Args:
        rows: of `drawings`, or of `shapes`.
        row: one of them, or a row of another split.
    """
    keys = ("thing",) if "thing" in row else ("shape", "color")
    return [
        i
        for i, other in enumerate(rows)
        if other["id"] != row["id"] and all(other[key] == row[key] for key in keys)
    ]


def _ask_shape(row: Mapping[str, Any], kind: str, draw: random.Random) -> Question:
    words = {"shape": row["shape"], "color": row["color"]}
    if kind in words:
        return _worded(kind, words[kind], draw, **words)
    part = kind.removeprefix("has-")
    there = draw.random() < 0.5
    if not there:
        words[part] = draw.choice([word for word in _SHAPE_WORDS[part] if word != words[part]])
    return _worded(kind, "yes" if there else "no", draw, **words)


_SHAPE_WORDS = {
    "shape": ("circle", "rectangle", "triangle"),
    "color": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
}


def _worded(kind: str, answer: str, draw: random.Random, **words: str) -> Question:
    first, second = draw.sample(WORDINGS[kind], 2)
    return Question(kind, first.format(**words), answer, second.format(**words))


def known_kinds() -> list[str]:
    """The kinds of things, each once."""
    return list(dict.fromkeys(thing.kind for thing in things().values()))
