"""Whether a text says what a question says, in other words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from data_builders.chat import UNFINISHED
from editing.audit import rephrases
from mmtune.data.texts import normalised

# Reasons for turning a candidate down.
REFUSED, NOTHING = "refusal", "nothing written"
COPIED, LONG, UNCLEAN, CUT = "same wording", "over-long", "talk around it", "cut off"
NO_QUESTION, LOST, NUMBER = "no question", "name, number, side or colour lost", "number added"
NEGATION, LANGUAGE, MEANING = "negation changed", "another language", "other meaning"

SMALL = frozenset(
    """
    a an the this that these those it its he she they them his her their there here is are was were
    be been being am do does did done can could will would should may might must has have had of in
    on at to from for with by about as and or not no what which who whom whose where when why how
    please tell me describe name image picture photo photograph drawing drawn shown show shows see
    seen kind type sort i you your we any some
    """.split()
)
ENGLISH = SMALL - {"me", "a", "i", "no", "am", "as", "an", "on", "in", "has", "he", "come"}
NUMBERS = dict(
    zip("two three four five six seven eight nine ten eleven twelve".split(), range(2, 13),
        strict=True)
)  # fmt: skip
# Words that a sentence encoder takes for each other, and a rewording has no other word for.
FIXED = frozenset(
    """
    left right top bottom front red orange yellow green blue purple pink brown black white gray grey
    """.split()
)
_NEGATION = re.compile(r"\b(?:not|never|no|none|nobody|nothing|without|neither|nor)\b|n['’]t\b")
_STARTS = re.compile(
    r"(?:what|which|who|whom|whose|where|when|why|how|is|are|was|were|do|does|did|can|could|will|"
    r"would|has|have|had|should|in|on|at|to|from|of|with)\b",
    re.IGNORECASE,
)
_ENDINGS = ("ings", "ing", "ers", "ed", "es", "er", "s", "e")


def polished(candidate: str, source: str) -> str:
    """With a capital where the question has one, and the mark of a question that lacks it."""
    if source[:1].isupper() and candidate[:1].islower():
        candidate = candidate[:1].upper() + candidate[1:]
    asks = source.rstrip().endswith("?") and _STARTS.match(candidate)
    return candidate + "?" if asks and candidate[-1:].isalnum() else candidate


def fault_of(candidate: str, source: str, longest: int, meaning: bool = True) -> str:
    """Why a candidate is no rewording, as far as its form tells; empty where it may be one.

    Args:
        candidate: a line without blanks around it.
        source: the question.
        longest: words that it may have.
        meaning: look for what a model may have lost or added, too; a person's wording is trusted.
    """
    checks: list[tuple[str, Callable[[], bool]]] = [
        (REFUSED, lambda: rephrases.is_refusal(candidate)),
        (COPIED, lambda: _key(candidate) == _key(source)),
        (LONG, lambda: len(candidate.split()) > longest),
        (UNCLEAN, lambda: bool(rephrases.defects(candidate, source))),
        (CUT, lambda: candidate.endswith(UNFINISHED)),
    ]
    lost: list[tuple[str, Callable[[], bool]]] = [
        (NO_QUESTION, lambda: source.rstrip().endswith("?") and not candidate.endswith("?")),
        (LANGUAGE, lambda: _foreign(candidate, source)),
        (LOST, lambda: not _kept(candidate, source)),
        (NUMBER, lambda: not _digits(candidate) <= _numbers(source)),
        (NEGATION, lambda: _denies(candidate) != _denies(source)),
    ]
    every = checks + lost if meaning else checks
    return next((reason for reason, is_so in every if is_so()), "")


def kept_words(candidate: str, source: str) -> float:
    """Share of a question's content words that a text has too, endings aside.

    Where the question has none (What is this?), 1 if the text has none either, else 0.
    """
    wanted, there = _content(source), _content(candidate)
    return len(wanted & there) / len(wanted) if wanted else float(not there)


def _content(text: str) -> set[str]:
    return {_stem(word) for word in _words(text) if word not in SMALL}


def _stem(word: str) -> str:
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) > 2:
            return word[: -len(ending)]
    return word


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", normalised(text))


def _key(text: str) -> str:
    """Case, blanks, quotes and punctuation do not make another wording."""
    return " ".join(_words(text))


def _kept(candidate: str, source: str) -> bool:
    """Whether every number, every name and every fixed word of a question is in a text."""
    words = set(_words(candidate))
    # The first word of a sentence has a capital for its place.
    names = re.findall(r"(?<=[^.?!:\"“'‘\s]\s)[\"“'‘]?([A-Z][\w]*)", source)
    wanted = {name.casefold() for name in names if name != "I"} | FIXED & set(_words(source))
    return wanted <= words and _numbers(source) <= _numbers(candidate)


def _digits(text: str) -> set[str]:
    return set(re.findall(r"\d+", unicodedata.normalize("NFKC", text)))


def _numbers(text: str) -> set[str]:
    return _digits(text) | {str(NUMBERS[word]) for word in _words(text) if word in NUMBERS}


def _denies(text: str) -> bool:
    return _NEGATION.search(text.casefold()) is not None


def _scripts(text: str) -> set[str]:
    """Names of alphabets, such as LATIN and CJK."""
    return {unicodedata.name(c, "?").split()[0].split("-")[0] for c in text if c.isalpha()}


def _foreign(candidate: str, source: str) -> bool:
    """Whether a text has another alphabet, or none of the small words of an English question."""
    if not _scripts(candidate) <= _scripts(source) | {"LATIN"}:
        return True
    if any(mark in candidate and mark not in source for mark in "¿¡"):
        return True
    words, asked = set(_words(candidate)), set(_words(source))
    return bool(asked & ENGLISH) and len(words) > 3 and not words & ENGLISH
