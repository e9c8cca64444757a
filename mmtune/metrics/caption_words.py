"""The words of captions as the COCO caption evaluation splits them.

That evaluation runs a Java program (the PTBTokenizer of Stanford CoreNLP 3.4.1, in lower case) and
leaves punctuation out. These rules give the same words for English captions; tests compare them
with that program's output, its oddities (round brackets become -lrb-, "!!!" stays) included.
"""

from __future__ import annotations

import re

LEFT_OUT = {"''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"}
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
TYPEWRITER = str.maketrans("‘’“”", "''\"\"")
# Words of two: how far the first goes.
DOUBLE = {"cannot": 3, "gonna": 3, "wanna": 3, "gotta": 3, "gimme": 3, "lemme": 3}

_WORD = re.compile(
    r"""
    \.\.\.                                      # what is left out, and what stays in one piece
  | --+ | [!?]+
  | '\d\ds\b | '(?:n|em|til|tis|twas)\b'?       # '80s, rock 'n' roll
  | (?:[^\W\d_]\.){2,}                         # a.m. u.s.
  | (?:mr|mrs|ms|dr|st|ave|vs|etc|ft|jr|sr|blvd|rd|mt|inc|ltd|co|corp|lt|sgt|prof|rev)\.
  | no\.(?=\s*\d)
  | \.\d+ | \d+(?:[,.:]\d+)+                    # .99 1,000 10:30, apart from a unit behind
  | n't\b | '(?:s|m|re|ve|ll|d)\b
  | y'(?=all\b)
  | [dlo]'[^\W\d_]+                             # o'clock
  | \w+?(?=n't\b)                               # does-n't
  | \w+(?:[-/.]\w+)*                            # t-shirt, black/white, example.com
  | \S
    """,
    re.VERBOSE,
)


def caption_words(text: str) -> list[str]:
    """A caption's words, without punctuation, in lower case."""
    found: list[str] = []
    for match in _WORD.finditer(text.translate(TYPEWRITER).lower()):
        token = match[0]
        if token in DOUBLE:
            found += [token[: DOUBLE[token]], token[DOUBLE[token] :]]
        elif token not in LEFT_OUT:
            found.append(BRACKETS.get(token, token))
    return found
