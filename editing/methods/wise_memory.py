"""WISE's rules: when a side memory is active, what its router loses, and how shards are merged.

Source: Wang et al., WISE, arXiv 2405.14768, sections 2.3 (equations 2 to 6) and 2.4; the merging is
TIES, Yadav et al., arXiv 2306.01708.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Margins(NamedTuple):
    """Of activations: at most `alpha` outside, at least `beta` on edits, `gamma` between them."""

    alpha: float
    beta: float
    gamma: float


def activations(x: Tensor, delta: Tensor, tokens: Tensor) -> Tensor:
    """[k] how much a side memory W + D would change a prompt: the mean over its tokens of |D x|.

    Args:
        x: [k, p, c] inputs of the matrix.
        delta: [d, c] the difference D of side and main memory.
        tokens: [k, p] bool, False for padding.
    """
    norms = torch.linalg.vector_norm((x @ delta.T).float(), dim=-1)
    return (norms * tokens).sum(1) / tokens.sum(1)


def margin_loss(edited: Tensor, unrelated: Tensor, margins: Margins) -> Tensor:
    """What activations [n] of edits and [m] of unrelated prompts lack of the margins; a scalar.

    Each of the three terms is the mean over those that violate it.
    """
    between = margins.gamma - (edited[:, None] - unrelated[None])
    short = (unrelated - margins.alpha, margins.beta - edited, between)
    return torch.stack([_mean_of_positive(term) for term in short]).sum()


def ties(deltas: Sequence[Tensor], density: float) -> Tensor:
    """One change made of several: trimmed, signs elected, the mean of those that agree.

    Args:
        deltas: of one shape.
        density: share of each change's numbers, the largest, that is kept.
    """
    if len(deltas) == 1:
        return deltas[0]
    trimmed = torch.stack([_trimmed(delta, density) for delta in deltas])
    sign = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agree = trimmed.sign() == sign
    return (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)


def mask_of(shape: torch.Size, share: float, seed: int) -> Tensor:
    """Which numbers of the side memory a shard may change: each with probability `share`; bool."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def _trimmed(delta: Tensor, density: float) -> Tensor:
    keep = max(1, int(density * delta.numel()))
    largest = delta.abs().flatten().topk(keep).indices
    kept = torch.zeros_like(delta.flatten())
    kept[largest] = delta.flatten()[largest]
    return kept.view_as(delta)


def _mean_of_positive(values: Tensor) -> Tensor:
    positive = values > 0
    return (values * positive).sum() / positive.sum().clamp(min=1)
