"""VQA accuracy as the official evaluation counts it, and exact match.

Source: Antol et al., arXiv 1505.00468, and the evaluation code of VQA v2, oddities included: texts
are left alone where all annotators agree; "somebody'd" loses its apostrophe; at most 32 full stops
are taken out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
ARTICLES = {"a", "an", "the"}
STOP = re.compile(r"\.(?!\d)")
DIGIT_COMMA = re.compile(r"\d,\d")
STOPS_TAKEN_OUT = 32
ENOUGH = 3  # annotators who agree, for the full score

# Words that get lost apostrophes back, one by one.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _lost(word: str) -> list[str]:
    """The word with each of its apostrophes lost in turn."""
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {lost: word for word in _CONTRACTIONS.split() for lost in _lost(word)}
CONTRACTIONS["somebody'd"] = "somebodyd"


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The official score of one answer, in [0, 1].

    The mean over annotators of min(1, matches among the others / 3). With fewer than four
    annotators, of which the official data has none, all others must agree for the full score; with
    a single one the score is 1 for a match.

    Raises:
        ValueError: no answers.
    """
    given, said = _comparable(prediction, answers)
    if len(said) == 1:
        return float(given == said[0])
    matches = sum(s == given for s in said)
    enough = min(ENOUGH, len(said) - 1)
    scores = [min(1.0, (matches - (s == given)) / enough) for s in said]
    return sum(scores) / len(scores)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where the answer is one that most annotators gave, after the same processing; else 0."""
    given, said = _comparable(prediction, answers)
    counts = Counter(said)
    return float(counts[given] == max(counts.values()))


def _comparable(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    """Prediction and answers as they are compared."""
    if not answers:
        raise ValueError("a question without answers cannot be scored")
    given, said = _plain(prediction), [_plain(a) for a in answers]
    if len(said) > 1 and len(set(said)) == 1:
        return given, said
    return processed(given), [processed(s) for s in said]


def _plain(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def processed(text: str) -> str:
    """A text without punctuation and articles, in lower case, with digits and contractions."""
    found = text
    with_number = DIGIT_COMMA.search(text) is not None
    for mark in PUNCTUATION:
        apart = f"{mark} " in text or f" {mark}" in text or with_number
        found = found.replace(mark, "" if apart else " ")
    found = STOP.sub("", found, count=STOPS_TAKEN_OUT)
    words = [DIGITS.get(word, word) for word in found.lower().split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ARTICLES)
