"""Weight updates of a model, cut into blocks as Aurora cuts them and stacked by block shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from mmtune.tuners.aurora.factors import cut

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

    from mmtune.backbones.base import Site


@dataclass(frozen=True, eq=False)
class Delta:
    """The update of one Linear: its site, and dW [out, in] in float32 on the CPU."""

    site: Site
    weight: Tensor = field(repr=False)


@dataclass(frozen=True)
class Block:
    """One d_out x d_in block of a weight, counted within it from the top or from the left."""

    branch: str
    layer: int | None
    role: str
    index: int
    path: str


@dataclass(frozen=True, eq=False)
class Stack:
    """All blocks of one shape.

    Attributes:
        key: names the shape, such as "768x768".
        tensor: [d_out, d_in, M] in float32.
        blocks: the M blocks, in the order of the last axis.
    """

    key: str
    tensor: Tensor = field(repr=False)
    blocks: tuple[Block, ...] = field(repr=False)

    @property
    def branches(self) -> list[str]:
        return list(dict.fromkeys(block.branch for block in self.blocks))


def has_deltas(model: nn.Module) -> bool:
    """Whether some adapted module of a wrapped model says what it adds to its weight."""
    return any(_says_delta(module) for module in model.modules())


def adapter_deltas(model: PeftModel, sites: Sequence[Site]) -> list[Delta]:
    """The weight updates of the active adapter.

    Args:
        model: the wrapped model; `has_deltas` of it is true.
        sites: those of the prepared backbone, listed before it was wrapped.
    """
    stock: Any = model.get_base_model()
    found = []
    for site in sites:
        layer = stock.get_submodule(site.path)
        if _says_delta(layer):
            weight = layer.get_delta_weight(model.active_adapter)
            found.append(Delta(site, weight.detach().float().cpu()))
    return found


def weight_deltas(base: Sequence[Site], tuned: Sequence[Site]) -> list[Delta]:
    """The difference of each site's Linear between two models; unchanged Linears are left out."""
    found = []
    for before, after in zip(base, tuned, strict=True):
        if hasattr(before.module, "in_features"):
            old, new = (s.module.get_parameter("weight").detach() for s in (before, after))
            weight = (new.float() - old.float()).cpu()
            if weight.any():
                found.append(Delta(before, weight))
    return found


def blocks_of(delta: Delta) -> list[Block]:
    """The blocks that an update is cut into."""
    site = delta.site
    count = cut(site, *delta.weight.shape).count
    return [Block(site.branch, site.layer, site.role, i, site.path) for i in range(count)]


def stacked(deltas: Sequence[Delta]) -> list[Stack]:
    """Cut every update into blocks and stack those of one shape, in the order of the model."""
    tensors: dict[str, list[Tensor]] = {}
    blocks: dict[str, list[Block]] = {}
    for delta in deltas:
        shape = cut(delta.site, *delta.weight.shape)
        wide = shape.columns > 1
        parts = delta.weight.chunk(shape.columns if wide else shape.rows, dim=1 if wide else 0)
        tensors.setdefault(shape.shape_key, []).extend(parts)
        blocks.setdefault(shape.shape_key, []).extend(blocks_of(delta))
    return [
        Stack(key, torch.stack(parts, -1), tuple(blocks[key])) for key, parts in tensors.items()
    ]


def _says_delta(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer) and hasattr(module, "get_delta_weight")
