"""How well a model gives an answer: teacher-forced on its tokens, and as written text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editing.metrics.aggregate import Score
from editing.metrics.definitions import NLL, PROBABILITY, TOKEN_ACCURACY, Definition

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # the label of what is not part of an answer


@dataclass(frozen=True)
class AnswerTokens:
    """The n tokens of b answers, with the scores from which each is predicted.

    Attributes:
        logits: [n, v], answer by answer, in order.
        ids: [n].
        rows: [n] number of the answer that a token belongs to.
        count: b; an answer may have no token.
    """

    logits: Tensor
    ids: Tensor
    rows: Tensor
    count: int

    @classmethod
    def of_sequence(cls, logits: Tensor, labels: Tensor) -> AnswerTokens:
        """The answer tokens of whole sequences.

        Labels lie on the tokens themselves and logits at t predict token t + 1: the pairs are
        (logits[b, t - 1], labels[b, t]). Nothing predicts the first token, so its label never
        counts.

        Args:
            logits: [b, s, v].
            labels: [b, s] token ids, -100 (`IGNORED`) where a token is no part of the answer.

        Raises:
            ValueError: shapes that do not fit.
        """
        return cls.of_targets(logits[:, :-1], labels[:, 1:], labels[:, 1:] != IGNORED)

    @classmethod
    def of_targets(cls, logits: Tensor, ids: Tensor, mask: Tensor) -> AnswerTokens:
        """The answer tokens where scores already stand beside the tokens that they predict.

        Args:
            logits: [b, t, v], as `MLLM.answer_logits` gives them.
            ids: [b, t].
            mask: [b, t], nonzero for the tokens that count: for the metrics `Batch.answer_mask`,
                which leaves out the end token after each answer.

        Raises:
            ValueError: shapes that do not fit.
        """
        if logits.shape[:2] != ids.shape or ids.shape != mask.shape:
            raise ValueError(
                "expected logits [b, t, v], ids [b, t] and mask [b, t], got "
                f"{[*logits.shape]}, {[*ids.shape]} and {[*mask.shape]}"
            )
        chosen = mask.bool()
        return cls(logits[chosen], ids[chosen], chosen.nonzero()[:, 0], len(ids))

    def hits(self) -> Tensor:
        """[n] bool: the token is ranked first."""
        return self.logits.argmax(-1) == self.ids

    def log_probabilities(self) -> Tensor:
        """[n] log p of each token, in float32 at least; differentiable."""
        from mmtune.backbones.generation import log_probabilities

        return log_probabilities(self.logits, self.ids, self.ids.new_ones(self.ids.shape))

    def scores(self, values: Tensor) -> list[Score | None]:
        """The sum of token values [n] over each answer; None for an answer without tokens."""
        import torch

        totals = torch.zeros(self.count, dtype=torch.float64, device=values.device)
        totals = totals.index_add(0, self.rows.to(values.device), values.detach().double())
        counts = torch.bincount(self.rows, minlength=self.count)
        pairs = zip(totals.tolist(), counts.tolist(), strict=True)
        return [Score(total, n) if n else None for total, n in pairs]


def answer_scores(tokens: AnswerTokens) -> Mapping[Definition, list[Score | None]]:
    """Token accuracy, NLL (nats) and probability of each of b answers.

    `aggregate.macro` of these weighs answers alike, `aggregate.micro` tokens; `aggregate.exact` of
    token accuracy is the share of answers of which every token is ranked first.
    """
    logs = tokens.log_probabilities()
    return {
        TOKEN_ACCURACY: tokens.scores(tokens.hits()),
        NLL: tokens.scores(-logs),
        PROBABILITY: tokens.scores(logs.exp()),
    }


def answer_nll(tokens: AnswerTokens) -> Tensor:
    """Scalar: mean of -log p over all answer tokens, in nats; what editors minimise.

    Raises:
        ValueError: there is no answer token.
    """
    if not len(tokens.ids):
        raise ValueError("expected at least one answer token to learn from, got none")
    return -tokens.log_probabilities().mean()


def generated_match(written: str, target: str) -> Score:
    """1 where the written answer is the target, else 0: `definitions.GENERATED`.

    Both are compared in lower case without punctuation and articles, numbers as digits, as VQA
    evaluation compares answers; a target of which this leaves nothing is compared as it is.

    Args:
        written: what the model wrote, without prompt and special tokens.
        target: the answer that the edit asks for.

    Raises:
        ValueError: an empty target.
    """
    from mmtune.metrics.vqa import exact_match, processed

    if not target.strip():
        raise ValueError("an empty target cannot be matched; leave such records out")
    if not processed(target).strip():
        return Score(float(written.strip() == target.strip()), 1)
    return Score(exact_match(written, [target]), 1)
