"""Matching of images and texts that were read together, against hard negatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtune.tasks.losses import Gathered
from mmtune.tasks.momentum import Bank

if TYPE_CHECKING:
    from mmtune.backbones.blip_matching import Matching


def hard_negatives(
    scores: Tensor, positive: Tensor, uniform: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Draw one wrong candidate for each row, with chances softmax(scores / temperature).

    Args:
        scores: [b, n].
        positive: [b, n] bool, the candidates that are right and never drawn.
        uniform: [b] in [0, 1), which decides.
        temperature: divides the scores.

    Returns:
        ([b] drawn candidates, [b] bool: whether there was one to draw; else the first is any).
    """
    found = ~positive.all(1)
    wrong = (scores.detach().double() / temperature).masked_fill(positive, -torch.inf)
    best = wrong.amax(1, keepdim=True).masked_fill(~found[:, None], 0)
    weights = (wrong - best).exp()
    reached = weights.cumsum(1)
    wanted = uniform.to(reached)[:, None] * reached[:, -1:]
    drawn = torch.searchsorted(reached, wanted, right=True).clamp(max=scores.shape[1] - 1)
    # A sum in parallel may round up at a candidate without weight; the likeliest stands in.
    unlucky = positive.gather(1, drawn)
    return torch.where(unlucky, weights.argmax(1, keepdim=True), drawn)[:, 0], found


def same_width(gather: Gathered, *tokens: Tensor) -> list[Tensor]:
    """Pad tables of tokens [b, t] with zeros to the width of the widest process."""
    if not gather.active:
        return list(tokens)
    width = tokens[0].new_tensor([tokens[0].shape[1]])
    torch.distributed.all_reduce(width, torch.distributed.ReduceOp.MAX)
    return [F.pad(x, (0, int(width) - x.shape[1])) for x in tokens]


@dataclass(frozen=True)
class Encoded:
    """Pairs of images and texts, each side encoded by itself.

    Attributes:
        input_ids: [b, t].
        attention_mask: [b, t].
        images: [b, s, d] hidden states.
        features: of the contrastive heads, with the pairs' groups.
    """

    input_ids: Tensor
    attention_mask: Tensor
    images: Tensor
    features: Bank

    def gathered(self, gather: Gathered) -> Encoded:
        """The pairs of all processes, with gradient through the hidden states alone."""
        f = self.features
        return Encoded(
            gather(self.input_ids),
            gather(self.attention_mask),
            gather(self.images),
            Bank(gather(f.image.detach()), gather(f.text.detach()), gather(f.groups)),
        )


def read_together(
    parts: Matching, own: Encoded, others: Encoded, uniform: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Class tokens of the pairs, of their images with hard texts, and of hard images with texts.

    Args:
        parts: of the model.
        own: b pairs.
        others: the pairs that negatives are drawn from, by the similarity of features.
        uniform: [b, 2] in [0, 1), which decides.
        temperature: divides similarities.

    Returns:
        ([3 b, d], [2 b] bool: which negatives there are).
    """
    mine, theirs = own.features, others.features
    positive = (mine.groups[:, None] == theirs.groups[None]).any(2)
    text, texts_found = hard_negatives(
        mine.image @ theirs.text.T, positive, uniform[:, 0], temperature
    )
    image, images_found = hard_negatives(
        mine.text @ theirs.image.T, positive, uniform[:, 1], temperature
    )
    fused = parts.fused(
        torch.cat([own.input_ids, others.input_ids[text], own.input_ids]),
        torch.cat([own.attention_mask, others.attention_mask[text], own.attention_mask]),
        torch.cat([own.images, own.images, others.images[image]]),
    )
    return fused, torch.cat([texts_found, images_found])


def matching_loss(logits: Tensor, found: Tensor, gather: Gathered) -> Tensor:
    """Cross-entropy of [no match, match] over positives and the negatives that were found.

    Args:
        logits: [3 b, 2]: b positive pairs, b images with hard texts, b hard images with texts.
        found: [2 b] bool, which of the negatives are real.
        gather: of the pairs of all processes.

    Returns:
        Scalar, the mean over all processes' pairs; see `mmtune.tasks.losses` for its scale.

    Source:
        ALBEF (arXiv 2107.07651), section 3.2.
    """
    with torch.autocast(logits.device.type, enabled=False):
        match = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        match[: gather.size] = 1
        counted = torch.cat([found.new_ones(gather.size), found]).float()
        each = F.cross_entropy(logits.float(), match, reduction="none")
        total = gather(counted.view(gather.size, 3)).sum()
        return gather.world * (each * counted).sum() / total
