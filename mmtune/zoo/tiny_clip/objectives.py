"""The losses of the recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def soft_targets(groups: Tensor, sentences: Tensor, share: float, sharpness: float) -> Tensor:
    """Which texts count as right for which pictures: the same text, and a little the alike ones.

    T = (1 - share) S / rowsum(S) + share softmax(sharpness s s^T), where S_ij = 1 for equal texts.

    Args:
        groups: numbers of texts.
        sentences: unit vectors s of the texts.
        share: of the weight that goes by similarity, in [0, 1].
        sharpness: inverse temperature of the similarity.

    Shape:
        groups [b]; sentences [b, 384]; result [b, b], rows sum to 1.
    """
    same = (groups[:, None] == groups[None, :]).float()
    alike = (sharpness * sentences @ sentences.T).softmax(dim=1)
    return (1 - share) * same / same.sum(dim=1, keepdim=True) + share * alike


def contrast(images: Tensor, texts: Tensor, scale: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of both directions against `targets`, averaged.

    L = -1/2b sum_ij T_ij (log softmax_j(scale i_i . t_j) + log softmax_j(scale t_i . i_j))

    Shape:
        images, texts [b, e], unit vectors; targets [b, b]; result scalar.
    """
    logits = scale * images @ texts.T
    rows = -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
    columns = -(targets * logits.T.log_softmax(dim=1)).sum(dim=1).mean()
    return (rows + columns) / 2


def unlike(pupil: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine similarity. Shape: [b, e], [b, e] -> scalar."""
    from torch.nn import functional as F

    return 1 - F.cosine_similarity(pupil, teacher, dim=-1).mean()
