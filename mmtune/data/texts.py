"""When two captions are the same text."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Iterable

log = logging.getLogger(__name__)


def normalised(text: str) -> str:
    """Case, width, white space and a closing full stop do not make two captions different."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).rstrip(". ")


def too_long(
    texts: Iterable[str], count_tokens: Callable[[str], int], context_length: int
) -> dict[str, int]:
    """The texts that a model would truncate, with their length in tokens.

    Args:
        texts: repeated texts are counted once.
        count_tokens: text -> tokens before truncation.
        context_length: tokens that the model takes.
    """
    found = {}
    for text in dict.fromkeys(texts):
        # No tokenizer here makes more tokens than bytes, beside start, end and a leading space.
        if len(text.encode()) + 3 > context_length:
            tokens = count_tokens(text)
            if tokens > context_length:
                found[text] = tokens
    return found


def report_too_long(
    texts: Iterable[str], count_tokens: Callable[[str], int], context_length: int
) -> int:
    """Log once how many texts are truncated, and the longest; returns how many."""
    every = list(texts)
    long = too_long(every, count_tokens, context_length)
    affected = sum(text in long for text in every)
    if long:
        text, tokens = max(long.items(), key=lambda item: item[1])
        log.warning(
            "%d of %d texts are longer than the %d tokens that the model takes; the rest is cut "
            "off. The longest has %d tokens: %.120r",
            affected,
            len(every),
            context_length,
            tokens,
            text,
        )
    return affected
