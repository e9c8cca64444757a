"""The gradient of an edit's loss in a region's weights, as rows: never as a dense matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    layers = {name: mllm.model.get_submodule(name.rpartition(".")[0]) for name in weights}
    found: dict[str, list[Rows]] = {name: [] for name in weights}
    for bare in (False, True):  # a layer runs once for those with an image, once for the others
        same = [request for request in requests if (request.image is None) == bare]
        for start in range(0, len(same), TOGETHER):
            batch = mllm.batch(same[start : start + TOGETHER])
            with torch.enable_grad(), captured(layers) as rows:
                loss = mllm.nll(batch).sum()
            if idle := [name for name in layers if name not in rows.outputs]:
                raise ValueError(
                    f"{idle[0]} takes no part in an answer to {same[start].question!r:.80}"
                    f"{' (which has no image)' if bare else ''}: choose another region for this "
                    "edit, such as language"
                )
            for name, (x, delta) in rows.rows(loss).items():
                found[name].append(nonzero_rows(x, delta))
    return {
        name: (torch.cat([x for x, _ in parts]), torch.cat([delta for _, delta in parts]))
        for name, parts in found.items()
    }
