"""The factors that all adapted weights share, and how a weight is cut into blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mmtune.backbones.base import Site
from mmtune.tuners.aurora.rounds import Rounds
from mmtune.tuners.sited import Attached


@dataclass(frozen=True)
class Blocks:
    """How one weight [rows * d_out, columns * d_in] is cut.

    Attributes:
        d_out: rows of a block.
        d_in: columns of a block.
        rows: blocks below one another (fc1: 4).
        columns: blocks beside one another (fc2: 4).
    """

    d_out: int
    d_in: int
    rows: int = 1
    columns: int = 1

    @property
    def count(self) -> int:
        return self.rows * self.columns

    @property
    def shape_key(self) -> str:
        """Names the factors; all blocks of one shape share them."""
        return f"{self.d_out}x{self.d_in}"


def cut(site: Site, out_features: int, in_features: int) -> Blocks:
    """Blocks of a site's weight: gate, fc1, fc2 in squares of the branch's width, others whole.

    An MLP whose width is no multiple of the branch's (SigLIP so400m: 4304 for 1152) stays whole.
    """
    d = site.width
    if site.role in ("fc1", "gate") and in_features == d and out_features % d == 0:
        return Blocks(d, d, rows=out_features // d)
    if site.role == "fc2" and out_features == d and in_features % d == 0:
        return Blocks(d, d, columns=in_features // d)
    return Blocks(out_features, in_features)


def sharing_key(sharing: str, site: Site, blocks: Blocks) -> str:
    """Names the factors of a site's blocks; blocks with one key share them."""
    groups = {"all": "", "branch": f"{site.branch}_", "layer": f"{site.branch}_{site.layer}_"}
    return groups[sharing] + blocks.shape_key


class AuroraLayer(BaseTunerLayer):
    """What PEFT visits: the adapted Linears, the factors they share, and layers that fuse."""

    def acting(self, group: str) -> list[str]:
        """The adapters that take part, among those in the container called `group`."""
        have = () if self.disable_adapters else getattr(self, group, ())
        return [name for name in self.active_adapters if name in have]


class ModeFactors(Attached, AuroraLayer):
    """U, V and core of every group of blocks that share them, registered once in the model.

    A group is a block shape, or (`sharing`) one within a branch or a layer.
    Parameters of an adapter, per group: U [R, d_in], V [d_out, R], core [R] or [R, R, R].
    """

    adapter_layer_names = ("aurora_U", "aurora_V", "aurora_core")
    other_param_names = ()

    def __init__(self) -> None:
        super().__init__()
        self.aurora_U = nn.ModuleDict()
        self.aurora_V = nn.ModuleDict()
        self.aurora_core = nn.ModuleDict()
        self.rounds = Rounds()

    def detach(self) -> None:
        self.rounds.leave()

    def add_adapter(self, name: str) -> None:
        for group in (self.aurora_U, self.aurora_V, self.aurora_core):
            if name not in group:
                group[name] = nn.ParameterDict()

    def require(
        self,
        name: str,
        key: str,
        blocks: Blocks,
        r: int,
        core: str,
        generator: torch.Generator | None,
    ) -> bool:
        """Make the factors called `key`, r components for such blocks, unless they exist.

        Returns:
            Whether they were made.
        """
        groups = (self.aurora_U, self.aurora_V, self.aurora_core)
        u_of, v_of, core_of = (cast(nn.ParameterDict, group[name]) for group in groups)
        if key in u_of:
            return False
        u = torch.randn(r, blocks.d_in, generator=generator) / math.sqrt(blocks.d_in)
        dense = core == "dense"
        mixing = torch.randn(r, r, r, generator=generator) / r if dense else torch.ones(r)
        u_of[key] = nn.Parameter(u)
        v_of[key] = nn.Parameter(torch.zeros(blocks.d_out, r))
        core_of[key] = nn.Parameter(mixing)
        return True

    def parts(self, name: str, key: str) -> tuple[Tensor, Tensor, Tensor]:
        """U, V and core as they are."""
        groups: Any = (self.aurora_U, self.aurora_V, self.aurora_core)
        u, v, core = (group[name][key] for group in groups)
        return u, v, core

    def of(self, name: str, key: str, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first `rank` components: U [rank, d_in], V [d_out, rank], core [rank] or [rank]^3."""
        u, v, core = self.parts(name, key)
        if len(u) == rank:
            return u, v, core
        part = core[:rank] if core.dim() == 1 else core[:rank, :rank, :rank]
        return u[:rank], v[:, :rank], part


def mixers(core: Tensor, modes: Tensor, interleaved: bool, rows: bool) -> Tensor:
    """M of every block, such that the update of block a is h -> (h M_a) V^T with h = x U^T.

    Args:
        core: [R] or [R, R, R].
        modes: [m, R], one mode vector a block.
        interleaved: mix the mode vectors as the released code does (dense core).
        rows: whether the blocks lie below one another (fc1) rather than beside one another (fc2);
            the released code transposes only the former.

    Returns:
        [m, R] for a diagonal core (the diagonals), [m, R, R] for a dense one.
    """
    if core.dim() == 1:
        return core * modes
    mixed = torch.einsum("ijk,mk->mij", core, modes)
    if not interleaved or len(modes) == 1:
        return mixed
    count, r = modes.shape
    flat = mixed.permute(1, 2, 0).reshape(r, count * r)  # column count * j + k holds mode k's entry
    cutting = flat.reshape(r, count, r).permute(1, 0, 2)
    return cutting if rows else cutting.transpose(1, 2)
