"""Weight updates turned into an Aurora adapter of a given size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from mmtune.analysis.components import learned_of
from mmtune.analysis.decompositions import Fit, fit_cp, fit_tucker, frame_of
from mmtune.analysis.deltas import Delta, Stack, adapter_deltas, stacked
from mmtune.analysis.running import require_starts
from mmtune.backbones.base import SiteError
from mmtune.runs import RunError, write_folder, write_json
from mmtune.tuners.aurora.config import AuroraConfig
from mmtune.tuners.aurora.factors import ModeFactors
from mmtune.tuners.aurora.layer import AuroraLinear

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from mmtune.analysis.sources import Source
    from mmtune.backbones.base import Backbone

RECORD = "compression.json"
_ADAPTER = "default"


@dataclass(frozen=True)
class Part:
    """The updates of one role in one branch: their norm, and the relative error of the new ones."""

    branch: str
    role: str
    norm: float
    error: float


@dataclass(frozen=True)
class Compressed:
    """What a compression found; the content of compression.json.

    Attributes:
        title: of the source.
        rank, core: of the new adapter.
        before, after: trained parameters.
        left_out: trained parameters of the source that are no updates of adapted weights.
        added: weights that the new adapter adapts although they had no update; theirs is zero.
        norm: Frobenius norm of all updates.
        error: relative error of all updates together.
        parts: the same by branch and role.
        starts: block shape -> errors of the decomposition's starts, before the best was refined.
    """

    title: str
    rank: int
    core: str
    before: int
    after: int
    left_out: int
    added: int
    norm: float
    error: float
    parts: tuple[Part, ...]
    starts: dict[str, tuple[float, ...]]


def compress(
    source: Source,
    out: Path,
    rank: int,
    core: str = "diagonal",
    starts: int = 3,
    seed: int = 0,
    progress: bool = True,
) -> Compressed:
    """Write an Aurora adapter whose updates are close to the source's.

    Each stack of equal blocks is decomposed by CP (diagonal core) or in Tucker's form (dense core).
    The errors are those of the adapter that is written.

    Args:
        source: the updates; its model is wrapped, and used up by this.
        out: must not exist, or be empty.
        rank: R of the adapter.
        core: "diagonal" or "dense".
        starts: starts of each CP decomposition, of which the best is kept.
        seed: of the random ones.
        progress: draw a progress bar.

    Raises:
        RunError: `out` is taken.
        ValueError: a rank, core or number of starts that makes no sense.
    """
    from peft import get_peft_model
    from tqdm import tqdm

    check(out, rank, core, starts)
    where = places(source.loaded.backbone, source.deltas)
    settings: Any = {"rank": rank, "core": core, "seed": seed, "gate": "off", "context": "off"}
    config = AuroraConfig(**settings, **where)
    generator = torch.Generator().manual_seed(seed)
    stacks, fits = stacked(source.deltas), []
    for stack in tqdm(stacks, unit="shape", disable=not progress):
        fits.append(_fit(stack, source, rank, core, starts, generator))
    model: Any = get_peft_model(source.loaded.model, config)
    _set(model, stacks, fits)
    starts_of = {stack.key: fit.starts for stack, fit in zip(stacks, fits, strict=True)}
    found = _measured(model, source, starts_of, config)

    def fill(folder: Path) -> None:
        model.save_pretrained(str(folder), save_embedding_layers=False)
        write_json(folder / RECORD, asdict(found))

    write_folder(out, fill)
    return found


def check(out: Path, rank: int, core: str, starts: int) -> None:
    """Refuse what `compress` would refuse, before anything is loaded."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists already; choose another folder for --out.")
    require_starts(starts)
    settings: Any = {"rank": rank, "core": core}
    AuroraConfig(**settings)


def places(backbone: Backbone, deltas: Sequence[Delta]) -> dict[str, Any]:
    """The branches, sites and layers of a config that chooses the places of these updates.

    Where no choice of layers gives just them, it gives all layers; the others' updates are zero.
    """
    roles: dict[str, list[str]] = {}
    layers: dict[str, set[int | None]] = {}
    for site in [delta.site for delta in deltas]:
        chosen = roles.setdefault(site.branch, [])
        if site.role not in chosen:
            chosen.append(site.role)
        layers.setdefault(site.branch, set()).add(site.layer)
    wanted = [delta.site.path for delta in deltas]
    most = max(map(len, layers.values()))
    listed = sorted({n for numbers in layers.values() for n in numbers if n is not None})
    for choice in ("all", f"first:{most}", f"last:{most}", listed):
        try:
            found = [site.path for site in backbone.select(None, roles, choice)]
        except SiteError:
            continue  # a branch has fewer layers than another
        if found == wanted:
            return {"sites": roles, "layers": choice}
    return {"sites": roles, "layers": "all"}


def _fit(
    stack: Stack, source: Source, rank: int, core: str, starts: int, generator: torch.Generator
) -> Fit:
    frame = frame_of(stack.tensor)
    if core == "dense":
        return fit_tucker(frame, rank)
    learned = learned_of(stack, source.learned)
    guess = learned.cp(rank, generator) if learned else None
    return fit_cp(frame, rank, starts, generator, guess)


def _set(model: PeftModel, stacks: Sequence[Stack], fits: Sequence[Fit]) -> None:
    """Write the decompositions into the parameters of a fresh adapter.

    Blocks that had no update get a mode of zeros. Shapes without any update keep the start of a
    fresh adapter, which changes nothing and can be trained.
    """
    stock: Any = model.get_base_model()
    known = {s.key: (s, f) for s, f in zip(stacks, fits, strict=True) if s.tensor.any()}
    with torch.no_grad():
        for module in stock.modules():
            if isinstance(module, AuroraLinear):
                if module.aurora_placed[_ADAPTER].blocks.shape_key in known:
                    module.aurora_modes[_ADAPTER].zero_()
            elif isinstance(module, ModeFactors):
                groups = (module.aurora_U, module.aurora_V, module.aurora_core)
                for key, (_, fit) in known.items():
                    for group, new in zip(groups, factors(fit)[:3], strict=True):
                        cast(Any, group[_ADAPTER])[key].copy_(new)
        for stack, fit in known.values():
            for row, block in zip(factors(fit)[3], stack.blocks, strict=True):
                stock.get_submodule(block.path).aurora_modes[_ADAPTER][block.index].copy_(row)


def factors(fit: Fit) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U [R, d_in], V [d_out, R], core and P [M, R] of a decomposition.

    CP components are scaled as in a fresh adapter (rows of U of norm 1, columns of P of mean square
    1, lambda 1), so that training can go on with the usual learning rate. Tucker's modes that have
    fewer than R components are filled with zeros.
    """
    (a, b, c), rank = fit.factors, fit.rank
    if fit.core is None:
        lengths = b.norm(dim=0), c.norm(dim=0) / math.sqrt(len(c))
        u, p = (m / torch.where(n > 0, n, 1.0) for m, n in zip((b, c), lengths, strict=True))
        return u.T, a * lengths[0] * lengths[1], torch.ones(rank, dtype=a.dtype), p
    v, u, p = (torch.nn.functional.pad(m, (0, rank - m.shape[1])) for m in (a, b, c))
    core = torch.zeros(rank, rank, rank, dtype=a.dtype)
    turned = fit.core.transpose(0, 1)  # Aurora's core is indexed by U, V, P
    core[tuple(slice(n) for n in turned.shape)] = turned
    return u.T, v, core, p


def _measured(
    model: PeftModel,
    source: Source,
    starts: dict[str, tuple[float, ...]],
    config: AuroraConfig,
) -> Compressed:
    """Compare the new adapter's updates with the source's."""
    wanted = {delta.site.path: delta for delta in source.deltas}
    sites = [delta.site for delta in source.deltas]
    found = adapter_deltas(model, sites)
    squares: dict[tuple[str, str], list[float]] = {}
    for delta in found:
        want = wanted[delta.site.path].weight.double()
        sums = squares.setdefault((delta.site.branch, delta.site.role), [0.0, 0.0])
        sums[0] += float(want.square().sum())
        sums[1] += float((delta.weight.double() - want).square().sum())
    parts = tuple(Part(*key, math.sqrt(s), _relative(e, s)) for key, (s, e) in squares.items())
    norm, error = (sum(sums[i] for sums in squares.values()) for i in (0, 1))
    return Compressed(
        title=source.title,
        rank=config.rank,
        core=config.core,
        before=source.parameters,
        after=sum(p.numel() for p in model.parameters() if p.requires_grad),
        left_out=source.left_out,
        added=len(config.adapted or []) - len(found),
        norm=math.sqrt(norm),
        error=_relative(error, norm),
        parts=parts,
        starts=starts,
    )


def _relative(error: float, norm: float) -> float:
    return math.sqrt(error / norm) if norm else math.sqrt(error)
