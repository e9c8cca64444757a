"""Rephrases as language models gave them: what is around the question, and the question itself."""

from __future__ import annotations

import re
from collections.abc import Callable

from mmtune.data.texts import normalised

COPY, REFUSAL = "rephrase equals src", "refusal"
QUOTES, SEVERAL, TALK = "rephrase in quotes", "several rephrases", "talk around the rephrase"

_REFUSAL = re.compile(
    r"\W*(?:(?:i['’]?m|i am|we are|we['’]re) (?:very )?sorry|sorry\b|i apologi[sz]e|my apologies|"
    r"i (?:cannot|can['’]t|can not|am unable|am not able)\b|i['’]m (?:unable|not able)\b|"
    r"as an? (?:ai|artificial intelligence|language model)\b)|.*\bas an ai language model\b",
    re.IGNORECASE | re.DOTALL,
)
_LAST_QUOTED = re.compile(r'(?P<before>.*\S)\s+"(?P<quoted>[^"\s][^"]*)"', re.DOTALL)
_ANNOUNCED = re.compile(
    r"(?:(?:sure|here|re(?:written|phrased|worded|vised)|new|another|alternative|question)\b"
    r'[^"?]*|(?:can|could) you\b[^"?]*\b(?:question|statement|sentence)):',
    re.IGNORECASE,
)
_LABEL = re.compile(r'[^"?]*:')
_SENTENCE = re.compile(r'.*[.?!"]')


def defects(rephrase: str, source: str) -> list[str]:
    """The kinds of defects that a rephrase of a question has, beside its length."""
    found = {
        COPY: rephrase == source,
        REFUSAL: is_refusal(rephrase),
        QUOTES: in_quotes(rephrase),
        SEVERAL: has_lines(rephrase),
        TALK: has_talk(rephrase, source),
    }
    return [kind for kind, is_so in found.items() if is_so]


def is_refusal(text: str) -> bool:
    """Whether a language model apologises instead of rewording."""
    return _REFUSAL.match(text) is not None


def in_quotes(text: str) -> bool:
    """Whether, blanks aside, the first and the last character are `"`."""
    bare = text.strip()
    return bare.startswith('"') and bare.endswith('"')


def has_lines(text: str) -> bool:
    """Whether there is a line break between words."""
    return len(text.strip().splitlines()) > 1


def has_talk(text: str, source: str) -> bool:
    """Whether one line quotes a question and says that it is one.

    Quoted words that belong to a question (What does "Stop" mean?) are no such thing.
    """
    found = _LAST_QUOTED.fullmatch(text.strip())
    if found is None or has_lines(text):
        return False
    before, quoted = found["before"].strip(), found["quoted"]
    return (
        _same(quoted, source)
        or before.startswith(f'"{source.strip()}"')
        or _ANNOUNCED.fullmatch(before) is not None
    )


def mend(text: str, source: str, kept: frozenset[str] = frozenset()) -> tuple[str, list[str]]:
    """Take a rephrase out of what is around it.

    Args:
        text: the rephrase as it stands.
        source: the question that it rephrases.
        kept: kinds to leave as they are.

    Returns:
        The rephrase, and the kinds that were mended. Of several candidates the first that is no
        copy of the question is taken, or the first where all are.
    """
    mended: list[str] = []
    while True:
        step = next(
            (n for n, (has, _) in _STEPS.items() if n not in kept and has(text, source)), ""
        )
        if not step:
            return text, mended
        text = _STEPS[step][1](text, source)
        mended += [step] if step not in mended else []


def _unquoted(text: str, source: str) -> str:
    return text.strip()[1:-1].strip()


def _best_line(text: str, source: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    candidates = [line for line in lines if not _LABEL.fullmatch(line)]
    sentences = [line for line in candidates if _SENTENCE.fullmatch(line)]
    if len(sentences) < 2 and len(candidates) == len(lines):
        return " ".join(lines)  # one sentence, wrapped
    return _best(candidates or lines, source)


def _best_quoted(text: str, source: str) -> str:
    return _best([found.strip() for found in re.findall(r'"([^"]*)"', text)][::-1], source)


def _best(candidates: list[str], source: str) -> str:
    new = (c for c in candidates if not _same(c, source) and not is_refusal(c))
    return next(new, candidates[0])


def _same(text: str, source: str) -> bool:
    """Whether case, quotes, blanks and a closing mark are all that two questions differ in."""
    one, other = (normalised(t.strip(' "')).rstrip("?. ") for t in (text, source))
    return one == other


_Step = tuple[Callable[[str, str], bool], Callable[[str, str], str]]
# Each makes the text shorter or takes its line breaks away, so mending ends.
_STEPS: dict[str, _Step] = {
    SEVERAL: (lambda text, source: has_lines(text), _best_line),
    TALK: (has_talk, _best_quoted),
    QUOTES: (lambda text, source: in_quotes(text), _unquoted),
}
