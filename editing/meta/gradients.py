"""The gradient of an edit's loss in a region's weights, as rows: never as a dense matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from editing.methods.mend_transform import captured, nonzero_rows
from editing.regions import parameters_of
from mmtune.backbones.base import SiteError

if TYPE_CHECKING:
    from editing.mllm import MLLM
    from editing.regions import Region, RegionName
    from editing.requests import EditRequest

TOGETHER = 16  # requests computed at once
Rows = tuple[Tensor, Tensor]


def matrices_of(mllm: MLLM, region: RegionName | Region) -> dict[str, nn.Parameter]:
    """The region's weights by name, of Linears alone.

    Raises:
        SiteError: the region holds a bias, or a weight of another kind of layer.
    """
    found = parameters_of(mllm.backbone, region)
    for name in found:
        layer = mllm.model.get_submodule(name.rpartition(".")[0])
        if not (isinstance(layer, nn.Linear) and name.endswith(".weight")):
            raise SiteError(
                f"a trained editor changes weights of Linears, and {name} is a parameter of a "
                f"{type(layer).__name__}: choose sites that are Linears, without biases"
            )
    return found


def each_gradient_rows(
    mllm: MLLM, weights: Mapping[str, Tensor], requests: Sequence[EditRequest]
) -> list[dict[str, Rows]]:
    """`gradient_rows` of every request alone, of all in one pass.

    Args:
        mllm: the model, edits possibly applied.
        weights: by name, of the language model: what reads rows as they were asked.
        requests: at least one.
    """
    found: list[dict[str, Rows]] = [{} for _ in requests]
    for numbers, name, x, delta in _captured(mllm, weights, requests):
        # Some families flatten rows and tokens to one dimension.
        parts = zip(*(part.unflatten(0, (len(numbers), -1)) for part in (x, delta)), strict=True)
        for number, part in zip(numbers, parts, strict=True):
            found[number][name] = nonzero_rows(*part)
    return found


def gradient_rows(
    mllm: MLLM, weights: Mapping[str, Tensor], requests: Sequence[EditRequest]
) -> dict[str, Rows]:
    """What each Linear reads, x, and the gradient at what it gives, delta: dL/dW = delta^T x.

    L is the sum over requests of -log p of the target, the mean over its tokens and its end token:
    several requests have the rows that each would have alone.

    Args:
        mllm: the model, edits possibly applied.
        weights: by name, see `matrices_of`.
        requests: at least one.

    Returns:
        Weight -> ([n, in], [n, out]) of the n tokens in which neither is all zero, detached.

    Raises:
        ValueError: a request without an image, where the region sees images only.
    """
    found: dict[str, list[Rows]] = {name: [] for name in weights}
    for _, name, x, delta in _captured(mllm, weights, requests):
        found[name].append(nonzero_rows(x, delta))
    return {
        name: (torch.cat([x for x, _ in parts]), torch.cat([delta for _, delta in parts]))
        for name, parts in found.items()
    }


def _captured(
    mllm: MLLM, weights: Mapping[str, Tensor], requests: Sequence[EditRequest]
) -> Iterator[tuple[list[int], str, Tensor, Tensor]]:
    """(numbers of requests, weight, x, delta) of each pass, as the layers read and gave them."""
    layers = {name: mllm.model.get_submodule(name.rpartition(".")[0]) for name in weights}
    for bare in (False, True):  # a layer runs once for those with an image, once for the others
        same = [i for i, request in enumerate(requests) if (request.image is None) == bare]
        for start in range(0, len(same), TOGETHER):
            numbers = same[start : start + TOGETHER]
            batch = mllm.batch([requests[i] for i in numbers])
            with torch.enable_grad(), captured(layers) as rows:
                loss = mllm.nll(batch).sum()
            if idle := [name for name in layers if name not in rows.outputs]:
                raise ValueError(
                    f"{idle[0]} takes no part in an answer to {requests[numbers[0]].question!r:.80}"
                    f"{' (which has no image)' if bare else ''}: choose another region for this "
                    "edit, such as language"
                )
            for name, (x, delta) in rows.rows(loss).items():
                yield numbers, name, x, delta
