"""Context enhancement: fused features look at the text once more."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmtune.tuners.aurora.factors import AuroraLayer

REFERENCE_SCALE = 0.1


def gathered(z: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
    """sum_j softmax_j(<z, t_j> / sqrt(d)) t_j.

    Args:
        z: [..., n, d], what looks.
        t: [..., m, d], what is looked at.
        mask: [..., 1 or n, m], bool (True takes part) or float (0 takes part, a large negative
            number does not); None means that all take part.

    Returns:
        [..., n, d].
    """
    scores = z @ t.transpose(-1, -2) / math.sqrt(z.shape[-1])
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask >= 0
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).to(t.dtype) @ t


class TokenContext(nn.Module):
    """What is added to a layer's cross-attention output y: alpha * `gathered`(y, s).

    The tokens s, the layer's self-attention output, are the pair's own, padding left out; so the
    score of a pair does not depend on its batch.

    Shape: y, s [b, t, d], mask None or [b, 1 or t, t] -> [b, t, d].
    Parameters: alpha [1], zero at start.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, y: Tensor, s: Tensor, mask: Tensor | None) -> Tensor:
        return self.alpha * gathered(y, s, mask)


class PooledContext(nn.Module):
    """Context from the texts of a batch, for the pooled features of fused pairs, in training only.

    It acts on no forward pass of the model: a task asks `context_of` for it and calls `enhance`
    between the fusion branch and the match head. What it leaks:

    - "batch": the score of a pair depends on the other texts of its batch, a hard negative's own
      caption among them, so scores of different batches cannot be compared.
    - "reference": positive pairs get 0.1 times the mean text, which negatives do not. With a linear
      match head that adds one constant to every positive's logits: the loss can fall without a
      better model, and evaluation lacks what training had.

    Attributes:
        positives_only: whether `enhance` is for the features of positive pairs alone.

    Parameters: "batch": alpha [1], zero at start; "reference": none.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.positives_only = kind == "reference"
        if not self.positives_only:
            self.alpha = nn.Parameter(torch.zeros(1))

    def enhance(self, fused: Tensor, text: Tensor) -> Tensor:
        """The features with context: z + alpha * `gathered`(z, text), or z + 0.1 * mean_b(text_b).

        Args:
            fused: [n, d], class-token features of pairs, before the match head.
            text: [b, d], class-token features of the batch's texts, before their projection.

        Returns:
            [n, d], in the dtype of `fused`.
        """
        if self.positives_only:
            added = REFERENCE_SCALE * text.mean(0)
        else:
            added = self.alpha * gathered(fused, text)
        return fused + added.to(fused.dtype)


def context_of(model: nn.Module) -> PooledContext | None:
    """The pooled context of the active adapter; call its `enhance` in training only.

    Args:
        model: possibly wrapped (PeftModel, DistributedDataParallel).

    Returns:
        None unless the active adapter has context "batch" or "reference" and adapters are enabled.
    """
    for layer in (m for m in model.modules() if isinstance(m, AuroraLayer)):
        held: Any = getattr(layer, "aurora_context", {})
        for name in layer.acting("aurora_context"):
            if isinstance(held[name], PooledContext):
                return held[name]
    return None
