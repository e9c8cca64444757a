"""Recall of retrieval, where every pair of the same text counts as right, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

KS = (1, 5, 10)


def hits(queries: Tensor, gallery: Tensor, groups: Sequence[int]) -> dict[int, np.ndarray]:
    """Whether each query finds an item of its own text among its K nearest.

    Args:
        queries: unit vectors; query i and gallery item i belong to text `groups[i]`.
        gallery: unit vectors.
        groups: n numbers.

    Returns:
        {K: bool array of length n}. Items of equal similarity rank by their index.

    Shape:
        queries, gallery [n, e].
    """
    import torch

    number = torch.tensor(list(groups))
    similarity = (queries.float() @ gallery.float().T).cpu()
    order = similarity.argsort(dim=1, descending=True, stable=True)
    right = number[order] == number[:, None]
    return {k: right[:, :k].any(dim=1).numpy() for k in KS}


def recall(found: np.ndarray, seed: int = 0, draws: int = 2000) -> dict[str, float]:
    """Percent of hits with a 95 % bootstrap interval over queries.

    Returns:
        {"value", "low", "high"} in [0, 100] and "n".
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    count = len(found)
    means = found[generator.integers(0, count, (draws, count))].mean(axis=1) * 100
    low, high = np.percentile(means, [2.5, 97.5])
    return {
        "value": round(float(found.mean()) * 100, 2),
        "low": round(float(low), 2),
        "high": round(float(high), 2),
        "n": count,
    }


def score(images: Tensor, texts: Tensor, groups: Sequence[int]) -> dict[str, dict[str, float]]:
    """R@1, 5 and 10 both ways: {"text_to_image_r1": {"value", "low", "high", "n"}, ...}."""
    result = {}
    for name, queries, gallery in (
        ("text_to_image", texts, images),
        ("image_to_text", images, texts),
    ):
        for k, found in hits(queries, gallery, groups).items():
            result[f"{name}_r{k}"] = recall(found)
    return result
