"""What a reply says: a choice, yes or no, a text. Every parser has a name, which results carry."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from mmtune.metrics.vqa import processed
from mmtune.probe.items import NO, YES, Item
from mmtune.probe.styles import LETTERS

FINAL = re.compile(r"\b(?:final )?answer\s*(?::|=|is\b:?)\s*", re.IGNORECASE)
NEGATIONS = ("no", "not", "n't", "none", "isn't", "aren't", "doesn't", "without", "neither")


@dataclass(frozen=True)
class Parsed:
    """What a reply was taken to say.

    Attributes:
        answer: a choice's text, "yes", "no", or words; None where nothing could be made of it.
        parser: its name.
    """

    answer: str | None
    parser: str


def parsed(item: Item, reply: str) -> Parsed:
    """What a reply to an item says, by the parser of its kind."""
    name, parse = PARSERS[item.kind]
    return Parsed(parse(item, final(reply)), name)


def final(reply: str) -> str:
    """The part behind the last "Answer:"; the whole reply where there is none."""
    ends = [match.end() for match in FINAL.finditer(reply)]
    rest = reply[ends[-1] :].strip() if ends else ""
    return rest or reply.strip()


def choice(item: Item, reply: str) -> str | None:
    """A letter by itself (A, (A), A., "A: …"), or else the one choice whose text stands there."""
    letters = LETTERS[: len(item.choices)]
    by_itself = rf"(?<![\w'])([{letters}])(?=\s*(?:[.,:;)\]]|$))"  # "A car" begins with no letter
    leading = re.match(rf"\W*([{letters}])(?=\s*(?:[.,:;)\]]|$))", reply, re.IGNORECASE)
    if leading and (leading[1].isupper() or len(reply.strip(" .()[]")) == 1):
        return item.choices[letters.index(leading[1].upper())]
    alone = set(re.findall(by_itself, reply, re.MULTILINE))
    said = processed(reply)
    named = [
        one
        for one in item.choices
        if re.search(rf"(?<!\w){re.escape(processed(one))}(?!\w)", said) and processed(one)
    ]
    if len(named) > 1:  # "red" within "dark red": the longer one was meant
        named = [
            a for a in named if not any(a != b and processed(a) in processed(b) for b in named)
        ]
    if len(named) == 1:
        return named[0]
    if not named and len(alone) == 1:
        return item.choices[letters.index(alone.pop())]
    return None


def yes_no(item: Item, reply: str) -> str | None:
    """Yes or no as a word; the first of them where both stand there; None where neither does."""
    words = re.findall(r"[a-z']+", reply.lower())
    found = [word for word in words if word in (YES, NO)]
    if found:
        return found[0]
    if words and any(word in NEGATIONS or word.endswith("n't") for word in words):
        return NO
    return None


def popes(item: Item, reply: str) -> str:
    """POPE's own: the first sentence holds "no" or "not", or else it counts as yes.

    Source: evaluate.py of POPE's repository.
    """
    first = reply.split(".")[0].replace(",", "")
    return NO if {"No", "not", "no"} & set(first.split(" ")) else YES


def exact(item: Item, reply: str) -> str | None:
    """The first line without quotes around it."""
    line = next((line.strip() for line in reply.splitlines() if line.strip()), "")
    return line.strip("\"'“”‘’`") or None


def words(item: Item, reply: str) -> str | None:
    """The first line, as VQA's answers are normalised."""
    line = next((line.strip() for line in reply.splitlines() if line.strip()), "")
    return processed(line) or None


PARSERS: dict[str, tuple[str, Callable[[Item, str], str | None]]] = {
    "choice": ("letter or text of a choice", choice),
    "yes-no": ("yes or no as a word", yes_no),
    "text": ("first line, unquoted", exact),
    "words": ("first line, normalised as VQA's", words),
}
