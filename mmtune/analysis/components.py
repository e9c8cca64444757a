"""Aurora's learned factors: what each component weighs, and which branches use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from mmtune.analysis.deltas import Block, Delta, Stack, blocks_of
from mmtune.tuners.aurora.layer import AuroraLinear

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Learned:
    """The factors that some blocks share, with alpha in the modes.

    Attributes:
        key: names them, such as "768x768", or "vision_768x768" where branches have their own.
        u: U [R, d_in].
        v: V [d_out, R].
        core: lambda [R], or [R, R, R].
        modes: P [M, R], zero where a branch uses fewer components.
        blocks: the M blocks.
    """

    key: str
    u: Tensor = field(repr=False)
    v: Tensor = field(repr=False)
    core: Tensor = field(repr=False)
    modes: Tensor = field(repr=False)
    blocks: tuple[Block, ...] = field(repr=False)

    def norms(self) -> Tensor:
        """[R]: the Frobenius norm of what component k of the modes adds to all blocks together.

        For a diagonal core ||v_k|| ||u_k|| |lambda_k| ||P_k||, for a dense one
        ||V core[:, :, k]^T U|| ||P_k||.
        """
        uses = self.modes.norm(dim=0)
        if self.core.dim() == 1:
            return self.v.norm(dim=0) * self.u.norm(dim=1) * self.core.abs() * uses
        turned = torch.einsum("ijk,ix->xjk", self.core, self.u @ self.u.T)
        turned = torch.einsum("xjk,jy->xyk", turned, self.v.T @ self.v)
        return (turned * self.core).sum((0, 1)).clamp(min=0).sqrt() * uses

    def cp(self, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor] | None:
        """CP factors [d_out, rank], [d_in, rank], [M, rank] of the components that weigh most.

        What is missing up to `rank` is random; None for a dense core.
        """
        if self.core.dim() != 1:
            return None
        most = self.norms().argsort(descending=True)[:rank]
        parts = (self.v * self.core)[:, most], self.u.T[:, most], self.modes[:, most]
        more = rank - len(most)
        a, b, c = (
            torch.cat([p, torch.randn(len(p), more, generator=generator, dtype=p.dtype)], dim=1)
            for p in parts
        )
        return a, b, c


def learned_factors(model: PeftModel, deltas: Sequence[Delta]) -> list[Learned]:
    """The factors of the active Aurora adapter; nothing for other adapters.

    Nor where the updates are no sums over components: in the interleaved block layout, and where a
    branch uses a corner of a dense core.
    """
    stock: Any = model.get_base_model()
    name: Any = model.active_adapter
    config: Any = model.active_peft_config
    found: dict[str, tuple[Any, list[Tensor], list[Block]]] = {}
    for delta in deltas:
        layer = stock.get_submodule(delta.site.path)
        if not isinstance(layer, AuroraLinear) or config.block_layout == "interleaved":
            return []
        key, shared = layer.aurora_placed[name].key, layer.factors
        _, rows, blocks = found.setdefault(key, (shared, [], []))
        rows.append(config.alpha * layer.aurora_modes[name].detach())
        blocks.extend(blocks_of(delta))
    learned = []
    for key, (shared, rows, blocks) in found.items():
        rank = len(shared.aurora_U[name][key])
        if config.core == "dense" and any(row.shape[1] < rank for row in rows):
            continue
        modes = torch.cat([torch.nn.functional.pad(row, (0, rank - row.shape[1])) for row in rows])
        u, v, core = shared.of(name, key, rank)
        numbers = (t.detach().double().cpu() for t in (u, v, core, modes))
        learned.append(Learned(key, *numbers, blocks=tuple(blocks)))
    return learned


def learned_of(stack: Stack, learned: Sequence[Learned]) -> Learned | None:
    """The factors that just the blocks of this stack were learned with, if there are any."""
    return next((one for one in learned if one.blocks == stack.blocks), None)


def holding(shares: Tensor, part: float) -> int:
    """How many of the largest shares (which sum to 1) it takes to hold `part`; 0 if all are 0."""
    ordered = shares.sort(descending=True).values.cumsum(0)
    return int((ordered < part * ordered[-1]).sum()) + 1 if ordered[-1] > 0 else 0


@dataclass(frozen=True)
class Similarity:
    """How alike the updates of two branches (or of one) are, in a stack that both are in.

    Attributes:
        stack: the block shape.
        branches: two names; the same one twice for the blocks within a branch.
        updates: mean |cosine| between their blocks' updates; None where no pair is not zero.
        components: cosine between how much of each learned component they use; None where no
            component is shared.
    """

    stack: str
    branches: tuple[str, str]
    updates: float | None
    components: float | None


def similarities(stack: Stack, learned: Learned | None) -> list[Similarity]:
    """Every pair of branches of a stack."""
    blocks = stack.tensor.flatten(0, 1).double()
    lengths = blocks.norm(dim=0)
    cosines = (blocks.T @ blocks / (lengths[:, None] * lengths)).abs()
    usable = (lengths > 0)[:, None] & (lengths > 0)
    names, found = stack.branches, []
    for first, one in enumerate(names):
        for other in names[first:]:
            pairs = usable & torch.outer(_of(stack.blocks, one), _of(stack.blocks, other))
            pairs = pairs.triu(1) if one == other else pairs
            mean = float(cosines[pairs].mean()) if pairs.any() else None
            use = _shared_use(learned, one, other) if learned and one != other else None
            found.append(Similarity(stack.key, (one, other), mean, use))
    return found


def _of(blocks: Sequence[Block], branch: str) -> Tensor:
    return torch.tensor([block.branch == branch for block in blocks])


def _shared_use(learned: Learned, one: str, other: str) -> float | None:
    uses = [learned.modes[_of(learned.blocks, branch)].norm(dim=0) for branch in (one, other)]
    lengths = uses[0].norm() * uses[1].norm()
    return float(uses[0] @ uses[1] / lengths) if lengths > 0 else None
