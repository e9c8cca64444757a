"""The rewordings of a question in what a chat model wrote around them."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

PAIRS = {
    '"': '"', "'": "'", "`": "`", "“": "”", "„": "“", "”": "”", "‘": "’", "‚": "‘",
    "«": "»", "»": "«", "‹": "›", "「": "」", "『": "』", "[": "]",
}  # fmt: skip
_OPENING, _CLOSING = "".join(PAIRS), "".join(sorted(set(PAIRS.values())))
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad"))
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"^\s*(?:```|~~~).*$|</?[a-z_]{1,20}/?>", re.MULTILINE | re.IGNORECASE)
_MARKER = re.compile(
    r"(?:[-*•‣◦·–—>#+]+\s+|[•‣◦]\s*|\(?\d{1,2}\s?[.):\]](?!\d)\s*|\[\d{1,2}\]\s*|\(?[a-zA-Z][.)]\s+|"
    r"\(?[ivx]{1,4}[.)]\s+)"
)
_EMPHASIS = re.compile(r"(\*\*|__|\*|_)(?=\S)(.+?)(?<=\S)\1")
# What announces the question that follows it, after "Sure!" or not.
_OPENER = re.compile(
    r"(?:sure(?: thing)?|certainly|of course|okay|ok|absolutely|great|yes|no problem|"
    r"i(?:['’]d| would) be (?:happy|glad) to(?: help)?)\s*[!,.:—-]+\s*",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"(?:(?:here|below|these|this|the following)\b[^?:\n]{0,120}|"
    r"(?:(?:one|an?|the|my|your|another|possible|new|alternative|alternate|different|other|"
    r"first|second|third|final|simple|simpler|formal|informal)\s+){0,3}"
    r"(?:re-?(?:phras|word|writ|stat|formulat|vis)\w*|paraphras\w*|alternative|alternate|variant|"
    r"variation|version|option|candidate|question|answer|output|response|result|q|a)"
    r"(?:\s+(?:of|the|this|your|original|question|sentence|version|wording|form|is|could be|"
    r"would be|as)){0,7}\s*#?\d{0,2}|"
    r"(?:you|we|one) (?:could|can|might|may) (?:ask|say|write)[^?:\n]{0,60}|"
    r"(?:assistant|system|model|ai))\s*[:：]\s*",
    re.IGNORECASE,
)
_ORIGINAL = re.compile(r"(?:the\s+)?(?:original|source|given|input)\b[^?:]{0,30}[:：]", re.I)
_AFTERWORD = re.compile(
    r"\(?(?:note|explanation|reason|rationale|in this|this (?:version|question|re|keeps|way)|"
    r"these|both|each|all of|i (?:hope|have|changed|kept|used)|i['’]ve|let me know|feel free|"
    r"please|hope)\b",
    re.IGNORECASE,
)
_CHATTER = re.compile(
    r"\b(?:(?:would you like|do you (?:want|need)) (?:me|another|more|any|other|help)|"
    r"(?:can|may|shall|should) i (?:help|assist|re\w+ it|try)|anything else (?:i|you)|"
    r"does (?:this|that) (?:help|work)|how (?:does|about) (?:this|that) (?:sound|look|work)|"
    r"is (?:this|that) ok|"
    r"(?:can|could) you (?:please )?(?:provide|clarify|rephrase|reword|rewrite) [^?]{0,40}"
    r"\b(?:questions?|sentence|statement|context|would like)\b)",
    re.IGNORECASE,
)
_TAIL = re.compile(r"(?<=[.!])\s+\((?:note|this|the|i|it|same|keeps)\b[^()]*\)\s*$", re.IGNORECASE)


def candidates_of(text: str) -> list[str]:
    """Every rewording in an output, without what is around it, in order and once each.

    Understands lists, several on a line, quotes of all kinds, labels and preambles, JSON, code
    fences, emphasis, thinking aloud, and explanations after a question. What is left may still be
    a refusal or no rewording: see `data_builders.rewordings`.

    Returns:
        Single lines that are not blank.
    """
    text = unicodedata.normalize("NFC", text.translate(_INVISIBLE))
    text = _FENCE.sub("\n", _THOUGHT.sub("", text)).strip()
    found = list(_json_texts(text)) or text.splitlines()
    every = [one for line in found for part in line.splitlines() for one in _of_line(part)]
    return list(dict.fromkeys(every))


def unquoted(text: str) -> str:
    """Without the quotes around the whole, nor one that was opened and never closed."""
    while True:
        text = bare = text.strip()
        first, last = text[:1], text[-1:]
        if len(text) > 1 and PAIRS.get(first) == last and last not in text[1:-1]:
            bare = text[1:-1]
        elif first and first in _OPENING and not set(PAIRS[first]) & set(text[1:]):
            bare = text[1:]
        elif last and last in _CLOSING and not _opened(text[:-1], last):
            bare = text[:-1]
        if bare == text:
            return text
        text = bare


def _opened(text: str, closing: str) -> bool:
    """Whether a quote that `closing` would close stands in the text."""
    return any(opening in text for opening, end in PAIRS.items() if end == closing)


def _json_texts(text: str) -> Iterator[str]:
    """The texts of the JSON array or object in an output; nothing where there is none."""
    for opening, closing in ("[]", "{}"):
        start, end = text.find(opening), text.rfind(closing)
        if 0 <= start < end:
            try:
                yield from _leaves(json.loads(text[start : end + 1]))
            except (ValueError, RecursionError):
                continue
            return


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _leaves(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _leaves(one)


def _of_line(line: str) -> Iterator[str]:
    """The candidates of one line."""
    if _ORIGINAL.match(_bare(line)):
        return
    line = _bare(line, labels=True)
    if line.endswith((":", "：")) or (_AFTERWORD.match(line) and "?" not in line):
        return
    quoted = _quoted_questions(line)
    for part in quoted or _questions(line):
        part = unquoted(_TAIL.sub("", _bare(part, labels=True)))
        part = " ".join(part.split())
        if any(map(str.isalnum, part)) and not _CHATTER.search(part):
            yield part


def _bare(line: str, labels: bool = False) -> str:
    """Without list markers, emphasis and quotes; with `labels`, without announcements too."""
    while True:
        before = line
        line = unquoted(_EMPHASIS.sub(r"\2", line))
        line = line[match.end() :] if (match := _MARKER.match(line)) else line
        if labels:
            for pattern in (_OPENER, _LABEL):
                line = line[match.end() :] if (match := pattern.match(line)) else line
        if line == before:
            return line.rstrip(",;") if line.endswith(("?,", "?;", '",')) else line


def _quoted_questions(line: str) -> list[str]:
    """Questions that a line quotes, such as in: "A?" can be rephrased as "B?".

    Quoted words that belong to a question (What does "Stop" mean?) are none.
    """
    found, outside, at = [], [], 0
    while at < len(line):
        end = PAIRS.get(line[at]) if at == 0 or not line[at - 1].isalnum() else None
        close = line.find(end, at + 1) if end else -1
        while end in ("'", "’") and close > 0 and line[close + 1 : close + 2].isalpha():
            close = line.find(end, close + 1)  # an apostrophe
        inner = line[at + 1 : close].strip().rstrip(",") if close > at else ""
        if inner.endswith("?") and len(inner.split()) > 2:
            found.append(inner)
            at = close + 1
        else:
            outside.append(line[at])
            at += 1
    return [] if "?" in "".join(outside) else found


def _questions(line: str) -> list[str]:
    """A line of several questions cut after each; what follows the last one is an explanation."""
    parts = re.findall(r"[^?？]*[?？]+[!?]*[\"'”’»]?", line)
    return [re.sub(r"^\s*(?:or|and|/|\||;|,)\s+", "", part, flags=re.I) for part in parts] or [line]
