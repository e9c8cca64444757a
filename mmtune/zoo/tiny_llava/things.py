"""What a drawing shows: one noun, and the kind of thing that it is, by its title and keywords."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_LIST = Path(__file__).with_name("nouns.txt")
# What the keywords say of whole series of drawings comes before any word of the title.
_SERIES = (
    ("flag", {"flag"}),
    ("playing card", {"card", "games"}),
    ("playing card", {"cardbacks"}),
    ("jigsaw", {"jigsaw"}),
    ("chess piece", {"chess"}),
    ("pattern", {"pattern"}),
    ("smiley", {"smiley"}),
    ("smiley", {"smilies"}),
    ("stick man", {"stickmen"}),
    ("road sign", {"roadsigns"}),
    ("map", {"coastline"}),
    ("map", {"map", "geography"}),
    ("speech bubble", {"callout"}),
    ("flow chart", {"flowchart"}),
    ("led light", {"led"}),
)
# Keywords that say the kind: of several nouns, the one of that kind counts ("wolf head").
_KINDS = {"animal": "animal", "animals": "animal", "food": "food"}
# The thing itself stands before these words: a flag of chad, a man with a hat.
_BEHIND = re.compile(r"\b(of|with|in|on|for|and|at|from|without|under|over)\b")


@dataclass(frozen=True)
class Thing:
    """A noun and its kind.

    Attributes:
        noun: such as "palm tree".
        kind: such as "plant".
        bare: whether the noun goes without an article ("bread").
    """

    noun: str
    kind: str
    bare: bool = False

    @property
    def named(self) -> str:
        """With its article: "a palm tree"."""
        return self.noun if self.bare else with_article(self.noun)


def with_article(noun: str) -> str:
    """`an apple`, `a palm tree`."""
    return f"{'an' if noun[0] in 'aeiou' and not noun.startswith('uni') else 'a'} {noun}"


@cache
def things() -> dict[str, Thing]:
    """What each known noun is said as."""
    found: dict[str, Thing] = {}
    for line in _LIST.read_text(encoding="utf-8").splitlines():
        kind, _, nouns = line.partition(":")
        if line.startswith("#"):
            continue
        for group in nouns.split(","):
            same = group.strip().split("/")
            thing = Thing(same[0].removeprefix("*"), kind, same[0].startswith("*"))
            for word in [thing.noun, *same[1:]]:
                found.setdefault(word, thing)
    return found


def thing_of(row: Mapping[str, Any]) -> Thing | None:
    """What a row of `clipart` (or an icon with a title) shows; None where no known noun says it.

    Args:
        row: with title and keywords.
    """
    keywords = {word.lower() for word in row["keywords"]}
    words = set(_words(row["title"])) | {part for word in keywords for part in word.split()}
    for noun, needed in _SERIES:
        if needed <= words:
            return things()[noun]
    title, _, behind = _BEHIND.sub("|", row["title"], count=1).partition("|")
    found = [thing for text in (title, behind, *row["keywords"]) for thing in _things_in(text)]
    wanted = {kind for word, kind in _KINDS.items() if word in keywords}
    return next((thing for thing in found if thing.kind in wanted), next(iter(found), None))


def words_of(row: Mapping[str, Any]) -> frozenset[str]:
    """Every noun that title, keywords and description hold: what may not be said to be absent."""
    texts = [row["title"], *row["keywords"], row.get("description") or ""]
    found = set()
    for text in texts:
        words = _words(text)
        for size in (1, 2):
            for start in range(len(words) - size + 1):
                thing = _known(" ".join(words[start : start + size]))
                if thing:
                    found |= {thing.noun, thing.kind}
    return frozenset(found)


def _things_in(text: str) -> list[Thing]:
    """The known nouns from the last to the first, that of two words before that of one."""
    words, found = _words(text), []
    end = len(words)
    while end > 0:
        size = next((n for n in (2, 1) if end >= n and _known(" ".join(words[end - n : end]))), 0)
        if size:
            found.append(_known(" ".join(words[end - size : end])))
        end -= size or 1
    return [thing for thing in found if thing]


def _known(noun: str) -> Thing | None:
    known = things()
    endings = (noun, noun.removesuffix("s"), noun.removesuffix("es"))
    return next((known[word] for word in endings if word in known), None)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())
