"""MMEdit's definitions, `compat="mmedit"`: only to stand beside published tables.

What is wrong with them: locality averages over image, prompt and padding positions, which an edit
hardly moves, so it stays high where every answer changed; ranks are compared in order, so a swap
of neighbours counts as a change; text put in front shifts positions, so an in-context edit seems
to change everything.

Source: MMEdit, arXiv 2310.08475, section 3, as its released code computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editing.metrics.aggregate import Score
from editing.metrics.answers import IGNORED, AnswerTokens
from editing.metrics.locality import kl

if TYPE_CHECKING:
    from torch import Tensor

TEXT_TOP, IMAGE_TOP = 1, 10  # ranks compared for text and for image locality


@dataclass(frozen=True)
class Quality:
    """Teacher-forced quality of a batch.

    Attributes:
        accuracy: share of answer tokens ranked first.
        exact_match: share of rows with all of them; a row without answer tokens counts as a hit.
        nll: mean of -log p over answer tokens, nats.
        probability: mean p over answer tokens.
        tokens: number of answer tokens.
    """

    accuracy: float
    exact_match: float
    nll: float
    probability: float
    tokens: int


def quality(logits: Tensor, labels: Tensor, off_by_one: bool = False) -> Quality:
    """Accuracy and loss of whole sequences.

    Args:
        logits: [b, s, v].
        labels: [b, s], -100 where a token is no part of the answer.
        off_by_one: pair logits[t] with labels[t], as the released training loss does for
            LLaVA-OneVision and Qwen2-VL: a model that echoes its input is then perfect.

    Raises:
        ValueError: there is no answer token.
    """
    if off_by_one:
        return _quality(AnswerTokens.of_targets(logits, labels, labels != IGNORED))
    return _quality(AnswerTokens.of_sequence(logits, labels))


def tail_quality(logits: Tensor, targets: Tensor) -> Quality:
    """The released text-only variant: targets are taken to end the input.

    Args:
        logits: [b, s, v]; the last one is dropped, and the t before it are scored.
        targets: [b, t].
    """
    end = logits.shape[1] - 1
    return _quality(
        AnswerTokens.of_targets(
            logits[:, end - targets.shape[1] : end], targets, targets.new_ones(targets.shape)
        )
    )


def tail_labels(targets: Sequence[Sequence[int]], length: int) -> Tensor:
    """[b, length] labels with each row's target at its end, whatever the padding side.

    Right with left padding; with right padding labels lie on padding.

    Args:
        targets: token ids of each answer.
        length: s of the padded input.
    """
    import torch

    labels = torch.full((len(targets), length), IGNORED, dtype=torch.int64)
    for row, target in zip(labels, targets, strict=True):
        if target:
            row[-len(target) :] = torch.tensor(target, dtype=torch.int64)
    return labels


def ordered_top(before: Tensor, after: Tensor, k: int) -> list[Score]:
    """Share of positions and ranks with the same token, of each row: all positions count.

    Both are cut to the shorter length, the ends kept; k is at most the vocabulary.

    Args:
        before: [b, s, v] logits.
        after: [b, s', v].
        k: `TEXT_TOP` or `IMAGE_TOP`.
    """
    length = min(before.shape[1], after.shape[1])
    width = min(k, before.shape[-1])
    first, second = (x[:, -length:].topk(width).indices for x in (before, after))
    return [Score(float(hits), length * width) for hits in (first == second).sum((1, 2)).tolist()]


def masked_divergence(before: Tensor, after: Tensor, mask: Tensor) -> Tensor:
    """Scalar: mean KL(before || after) over the positions of `mask`; differentiable.

    The released locality loss of trained editors: the mask is the attention mask, so prompts count.

    Args:
        before: [b, s, v] logits.
        after: [b, s, v].
        mask: [b, s].
    """
    values = kl(before, after)
    weights = mask.to(values)
    return (weights * values).sum() / weights.sum()


def _quality(tokens: AnswerTokens) -> Quality:
    if not len(tokens.ids):
        raise ValueError("expected at least one answer token, got none")
    hits, logs = tokens.hits(), tokens.log_probabilities()
    rows = tokens.scores(hits)
    right = [score is None or score.total == score.n for score in rows]
    return Quality(
        accuracy=float(hits.double().mean()),
        exact_match=sum(right) / len(right),
        nll=float(-logs.double().mean()),
        probability=float(logs.double().exp().mean()),
        tokens=len(tokens.ids),
    )
