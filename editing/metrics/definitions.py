"""The definitions behind every number: what a table, a report or a JSON line says it shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "reliability",
    "text_generality",
    "image_generality",
    "text_locality",
    "image_locality",
    "portability",
]
Compat = Literal["mmedit"]


@dataclass(frozen=True)
class Definition:
    """One way to measure.

    Attributes:
        name: what outputs call it.
        meaning: what is averaged.
        unit: "share" in [0, 1], or "nats".
        higher_is_better: False for divergences and losses.
    """

    name: str
    meaning: str
    unit: Literal["share", "nats"] = "share"
    higher_is_better: bool = True


GENERATED = Definition(
    "generated exact match",
    "the greedily written answer equals the target, apart from case, punctuation and articles",
)
TOKEN_ACCURACY = Definition(
    "token accuracy",
    "answer tokens ranked first where the model is shown the right tokens before (teacher forcing)",
)
PROBABILITY = Definition("token probability", "probability of the answer tokens, teacher forcing")
NLL = Definition(
    "token NLL", "-log p of the answer tokens, teacher forcing", "nats", higher_is_better=False
)
AGREEMENT = Definition(
    "argmax agreement",
    "answer tokens at whose place the model ranks the same token first before and after the edit",
)
DIVERGENCE = Definition(
    "KL(before || after)",
    "divergence of the next-token distributions at the answer tokens",
    "nats",
    higher_is_better=False,
)
MMEDIT_ACCURACY = Definition(
    "mmedit: token accuracy", "answer tokens ranked first, teacher forcing; no generation"
)
MMEDIT_TEXT_LOCALITY = Definition(
    "mmedit: top-1, all positions",
    "positions (prompt and padding too) with the same first token before and after",
)
MMEDIT_IMAGE_LOCALITY = Definition(
    "mmedit: ordered top-10, all positions",
    "ranks 1 to 10 of all positions (image, prompt and padding too) with the same token at the "
    "same rank before and after",
)
OVERLAPS = (5, 10)


def overlap_definition(k: int) -> Definition:
    """Overlap of the sets of the k likeliest tokens."""
    return Definition(
        f"top-{k} overlap",
        f"share of the {k} likeliest tokens at the answer tokens that before and after have in "
        "common, in any order",
    )


def ordered_definition(k: int) -> Definition:
    """Rank-by-rank agreement of the k likeliest tokens."""
    return Definition(
        f"ordered top-{k}",
        f"ranks 1 to {k} at the answer tokens with the same token at the same rank",
    )


_ANSWERS = (GENERATED, TOKEN_ACCURACY)
_LOCALITY = (AGREEMENT, *map(overlap_definition, OVERLAPS), DIVERGENCE)
_COMPAT: dict[str, Definition] = {
    "text_locality": MMEDIT_TEXT_LOCALITY,
    "image_locality": MMEDIT_IMAGE_LOCALITY,
}


def definitions_of(kind: Kind, compat: Compat | None = None) -> tuple[Definition, ...]:
    """The definitions that a kind of metric is reported in; the first is the one to quote.

    Args:
        kind: of the metric.
        compat: "mmedit" only to compare with published tables.

    Source: MMEdit, arXiv 2310.08475, section 3, and its released code for the compatible ones.
    """
    if compat == "mmedit":
        return (_COMPAT.get(kind, MMEDIT_ACCURACY),)
    return _LOCALITY if kind in _COMPAT else _ANSWERS
