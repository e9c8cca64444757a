"""What an edit changed that it should not have: the model before and after, at answer tokens.

Only places from which an answer token is predicted count. The i-th answer token before is paired
with the i-th after, so text that an in-context editor puts in front does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from editing.metrics.aggregate import Score
from editing.metrics.answers import AnswerTokens
from editing.metrics.definitions import (
    AGREEMENT,
    DIVERGENCE,
    OVERLAPS,
    Definition,
    ordered_definition,
    overlap_definition,
)

if TYPE_CHECKING:
    from torch import Tensor


def agreement(before: AnswerTokens, after: AnswerTokens) -> Tensor:
    """[n] bool: the same token is ranked first.

    Raises:
        ValueError: `before` and `after` are of other answers, as in all functions here.
    """
    require_paired(before, after)
    return before.logits.argmax(-1) == after.logits.argmax(-1)


def overlap(before: AnswerTokens, after: AnswerTokens, k: int) -> Tensor:
    """[n] in [0, 1]: |top-k before & top-k after| / k, with k at most the vocabulary."""
    first, second = _top(before, after, k)
    common = (first[:, :, None] == second[:, None, :]).any(-1)
    return common.double().mean(-1)


def ordered_match(before: AnswerTokens, after: AnswerTokens, k: int) -> Tensor:
    """[n] in [0, 1]: share of ranks 1 to k with the same token, k at most the vocabulary."""
    first, second = _top(before, after, k)
    return (first == second).double().mean(-1)


def divergence(before: AnswerTokens, after: AnswerTokens) -> Tensor:
    """[n] KL(before || after) in nats, in float32 at least; differentiable."""
    require_paired(before, after)
    return kl(before.logits, after.logits)


def kl(before: Tensor, after: Tensor) -> Tensor:
    """[...] KL(softmax(before) || softmax(after)) in nats of logits [..., v], in float32 at least.

    Tokens that `before` gives no chance (logits of -inf) count nothing.
    """
    import torch

    exact = torch.promote_types(before.dtype, torch.float32)
    p, q = (x.to(exact).log_softmax(-1) for x in (before, after))
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1)


def locality_scores(
    before: AnswerTokens,
    after: AnswerTokens,
    ks: Sequence[int] = OVERLAPS,
    ordered: Sequence[int] = (),
) -> Mapping[Definition, list[Score | None]]:
    """Agreement, overlaps of the top-k sets and divergence of each of b answers.

    Args:
        before: of the unedited model.
        after: of the edited model, same answers.
        ks: sizes of the sets.
        ordered: ks of rank-by-rank agreement, which a swap of neighbours already breaks.
    """
    values = {
        AGREEMENT: agreement(before, after),
        **{overlap_definition(k): overlap(before, after, k) for k in ks},
        **{ordered_definition(k): ordered_match(before, after, k) for k in ordered},
        DIVERGENCE: divergence(before, after),
    }
    return {definition: before.scores(value) for definition, value in values.items()}


def require_paired(before: AnswerTokens, after: AnswerTokens) -> None:
    """Check that both hold the same tokens of the same answers.

    Raises:
        ValueError: they do not.
    """
    import torch

    same = (
        before.count == after.count
        and torch.equal(before.rows, after.rows)
        and torch.equal(before.ids, after.ids)
        and before.logits.shape == after.logits.shape
    )
    if not same:
        raise ValueError(
            "before and after must hold the same answer tokens over the same vocabulary, got "
            f"{len(before.ids)} tokens of {before.count} answers, logits "
            f"{[*before.logits.shape]}, and {len(after.ids)} of {after.count}, logits "
            f"{[*after.logits.shape]}"
        )


def _top(before: AnswerTokens, after: AnswerTokens, k: int) -> tuple[Tensor, Tensor]:
    """[n, k] ids of the likeliest tokens, best first."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    require_paired(before, after)
    width = min(k, before.logits.shape[-1])
    return before.logits.topk(width).indices, after.logits.topk(width).indices
