"""An edit for each record of a training step, all in one pass: one that each is edited by alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from editing.regions import region_of
from mmtune.backbones.base import SiteError

if TYPE_CHECKING:
    from editing.changes import LowRank
    from editing.regions import Region, RegionName
    from mmtune.backbones.base import Backbone


def require_language(backbone: Backbone, region: RegionName | Region) -> None:
    """Check that what a region holds reads one row for each question.

    Raises:
        SiteError: it holds more than parts of the language model. Images are read once for all who
            ask about them, by some families all in one row.
    """
    branches = region_of(backbone, region).branches
    if set(branches) != {"language"}:
        raise SiteError(
            f"records are edited apart in the language model alone, and this region is in "
            f"{', '.join(branches)}: choose region: language, or leave apart out"
        )


@contextmanager
def each_changed(
    model: nn.Module, changes: Sequence[Mapping[str, LowRank]], sizes: Sequence[int]
) -> Iterator[None]:
    """The first `sizes[0]` rows of a batch inside are computed with the first change, and so on.

    No weight is touched: x R^T L^T is added to what a Linear gives; differentiable through the
    factors.

    Args:
        model: the stock model.
        changes: weight -> its change, the same weights for all.
        sizes: of each, how many rows of the batch it is for, all with an image or all without.
    """
    used = [(change, size) for change, size in zip(changes, sizes, strict=True) if size]
    with ExitStack() as hooks:
        for name in changes[0]:
            layer = model.get_submodule(name.rpartition(".")[0])
            factors = [change[name] for change, _ in used]
            hook = _adding(factors, [size for _, size in used])
            hooks.callback(layer.register_forward_hook(hook).remove)
        yield


def _adding(changes: Sequence[LowRank], sizes: Sequence[int]) -> Any:
    def hook(_: nn.Module, read: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # Some families flatten rows and tokens to one dimension.
        rows = read[0].unflatten(0, (sum(sizes), -1)).split(list(sizes))
        parts = [
            F.linear(F.linear(x.to(c.right), c.right), c.left)
            for x, c in zip(rows, changes, strict=True)
        ]
        added = torch.cat(parts).reshape(output.shape)
        return (output.to(added) + added).to(output.dtype)

    return hook
