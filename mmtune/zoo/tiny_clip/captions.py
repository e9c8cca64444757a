"""Training texts of a drawing: its caption said in other ways, drawn anew each step."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

SIDED = frozenset(
    "left right back forward next previous undo redo turn east west icon flag map sign card".split()
)


def variants(row: Mapping[str, Any], count: int, draw: random.Random) -> list[str]:
    """Texts for one drawing: the caption first, then others made of title, keywords, description.

    Args:
        row: with caption, title, keywords and description.
        count: how many texts to return; repeats fill up where there are fewer.
        draw: decides which keywords go together.
    """
    title, keywords = row["title"], list(row["keywords"])
    found = [row["caption"], title]
    if row["description"]:
        found.append(f"{title}, {row['description']}")
    for _ in range(3 * count):
        if len(set(found)) >= count or not keywords:
            break
        some = draw.sample(keywords, draw.randint(1, min(3, len(keywords))))
        found.append(", ".join([title, *some] if draw.random() < 0.8 else some))
    unique = list(dict.fromkeys(found))
    return [unique[i % len(unique)] for i in range(count)]


def may_mirror(row: Mapping[str, Any]) -> bool:
    """Whether a mirrored drawing still is what its text says."""
    return not SIDED & set(row["caption"].replace(",", " ").split())


def text_groups(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers by which rows of the same caption are the same text."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(row["caption"], len(numbers)) for row in rows]
