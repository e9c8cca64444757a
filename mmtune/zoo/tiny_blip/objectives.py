"""The losses of the recipe that tiny-clip's has not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmtune.zoo.tiny_blip.tokenizer import PAD, SPECIAL

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def hard_negatives(logits: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    """For each row a column of another group, drawn by the softmax of the row's logits.

    Args:
        logits: of rows with columns, scaled.
        groups: numbers of texts; equal ones are no negatives. With one group alone, any column.
        generator: on the same device.

    Shape:
        logits [b, b]; groups [b]; result int64 [b].

    Source: BLIP (arXiv:2201.12086), section 3.2, after ALBEF (arXiv:2107.07651), section 3.2.
    """
    import torch

    same = groups[:, None] == groups[None, :]
    barred = same & ~same.all(dim=1, keepdim=True)
    chance = logits.float().masked_fill(barred, -torch.inf).softmax(dim=1)
    # a little for every other text, so that near duplicates do not take all
    chance = (chance + 1e-4).masked_fill(barred, 0.0)
    return torch.multinomial(chance, 1, generator=generator)[:, 0]


def next_token_loss(
    logits: Tensor, ids: Tensor, smoothing: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy of each token but the first, given those before it; padding does not count.

    Args:
        logits: of the token that follows each.
        ids: the tokens.
        smoothing: of the labels.
        weights: of the texts; the mean is over their tokens. None means 1.

    Shape:
        logits [b, t, v]; ids [b, t]; weights [b]; result scalar.
    """
    from torch.nn import functional as F

    targets = ids[:, 1:]
    loss = F.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), targets, reduction="none", label_smoothing=smoothing
    )
    counted = (targets != SPECIAL.index(PAD)).float()
    if weights is not None:
        counted = counted * weights[:, None]
    return (loss * counted).sum() / counted.sum().clamp_min(1e-6)
