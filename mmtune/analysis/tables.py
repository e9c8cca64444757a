"""What an analysis and a compression found, as lines of tables for terminal and page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mmtune.analysis.components import holding
from mmtune.analysis.decompositions import METHODS
from mmtune.report.numbers import percent

if TYPE_CHECKING:
    from mmtune.analysis.compressing import Compressed
    from mmtune.analysis.running import Analysis, Measured


@dataclass(frozen=True)
class Sheet:
    """A table: its title, header, lines, and what to know to read it."""

    title: str
    header: tuple[str, ...]
    lines: list[tuple[str, ...]]
    note: str = ""


@dataclass(frozen=True)
class HeatMap:
    """Norms of the updates of one branch.

    Attributes:
        branch: its name.
        layers: one a row, in the order of the model.
        projections: one a column; the blocks of a weight that is cut have one each.
        norms: rows of ||dW_m||; None where the adapter has nothing.
    """

    branch: str
    layers: list[str]
    projections: list[str]
    norms: list[list[float | None]]


def sheets(analysis: Analysis) -> list[Sheet]:
    """Every table of an analysis but the heat maps; those without lines are left out."""
    found = [
        component_sheet(analysis),
        similarity_sheet(analysis),
        spectrum_sheet(analysis),
        fit_sheet(analysis),
    ]
    return [sheet for sheet in found if sheet.lines]


def component_sheet(analysis: Analysis) -> Sheet:
    """How many of the learned components matter."""
    lines = []
    for found in analysis.components:
        energies = torch.tensor(found.energies, dtype=torch.float64)
        counts = [str(holding(energies, part)) for part in (0.9, 0.99)]
        largest = percent(100 * float(energies.max()))
        lines.append((found.factors, str(len(energies)), *counts, largest))
    return Sheet(
        "learned components",
        ("factors", "components", "hold 90 %", "hold 99 %", "largest"),
        lines,
        "a component's energy is the norm of what it adds to all blocks together (with a diagonal "
        "core ||v_r|| ||u_r|| |lambda_r| ||P_r||), as a share of their sum",
    )


def heat_maps(analysis: Analysis) -> list[HeatMap]:
    """One map a branch, of all block shapes together."""
    cells: dict[str, dict[tuple[str, str], float]] = {}
    parts: dict[tuple[str, str], int] = {}
    modes = [mode for stack in analysis.stacks for mode in stack.modes]
    for mode in modes:
        place = (mode.block.branch, mode.block.role)
        parts[place] = max(parts.get(place, 0), mode.block.index + 1)
    for mode in modes:
        block = mode.block
        cut = parts[block.branch, block.role] > 1
        name = f"{block.role} {block.index + 1}" if cut else block.role
        layer = "-" if block.layer is None else str(block.layer)
        cells.setdefault(block.branch, {})[layer, name] = mode.norm
    return [
        HeatMap(branch, rows, columns, [[found.get((r, c)) for c in columns] for r in rows])
        for branch, found in cells.items()
        for rows in [sorted({row for row, _ in found}, key=lambda r: (r == "-", r.zfill(4)))]
        for columns in [list(dict.fromkeys(column for _, column in found))]
    ]


def heat_sheet(heat: HeatMap) -> Sheet:
    """A heat map as numbers."""
    lines = [
        (layer, *("" if norm is None else f"{norm:.3g}" for norm in norms))
        for layer, norms in zip(heat.layers, heat.norms, strict=True)
    ]
    return Sheet(f"||dW|| in {heat.branch}", ("layer", *heat.projections), lines)


def similarity_sheet(analysis: Analysis) -> Sheet:
    """How alike the updates of branches are, and what they share of learned components."""
    header = ("blocks", "branches", "mean |cos| of updates", "cos of component use")
    lines = [
        (
            found.stack,
            " and ".join(dict.fromkeys(found.branches)),
            "" if found.updates is None else f"{found.updates:.3f}",
            "" if found.components is None else f"{found.components:.3f}",
        )
        for found in analysis.similarities
    ]
    if not any(line[-1] for line in lines):
        header, lines = header[:-1], [line[:-1] for line in lines]
    return Sheet(
        "similarity of modes",
        header,
        lines,
        "between the blocks of two branches, or within one; branches of different width share no "
        "blocks and cannot be compared",
    )


def spectrum_sheet(analysis: Analysis) -> Sheet:
    """How many dimensions the stacks have."""
    lines = []
    for stack in analysis.stacks:
        spectra = [torch.tensor(shares, dtype=torch.float64) for shares in stack.spectra]
        ranks = [f"{holding(s, 0.9)} / {holding(s, 0.99)}" for s in spectra]
        lines.append((stack.stack, str(stack.shape[2]), f"{stack.norm:.3g}", *ranks))
    return Sheet(
        "spectrum of the stacks",
        ("blocks", "count", "norm", "rows", "columns", "modes"),
        lines,
        "directions that hold 90 % / 99 % of the squared norm, in each unfolding of a stack",
    )


def fit_sheet(analysis: Analysis) -> Sheet:
    """Errors at equal numbers of parameters."""
    rows: dict[tuple[str, int], dict[str, Measured]] = {}
    for fit in analysis.fits:
        rows.setdefault((fit.stack, fit.budget), {})[fit.method] = fit
    lines = []
    for (stack, budget), found in rows.items():
        cells = [_fit_cell(found.get(method)) for method in METHODS]
        starts = _range(found["cp"].starts) if "cp" in found else ""
        lines.append((stack, f"{budget:,}", *cells, starts))
    return Sheet(
        "relative error at equal numbers of parameters",
        ("blocks", "parameters", "SVD of every block", "Tucker", "CP", "starts of CP"),
        lines,
        "in brackets the rank, the largest that fits (Tucker: one rank for all modes, as in "
        "Aurora's dense core); CP is the best of its starts, refined",
    )


def _fit_cell(fit: Measured | None) -> str:
    return "too few" if fit is None else f"{_error(fit.error)} [{fit.rank}]"


def _range(errors: Sequence[float]) -> str:
    low, high = _error(min(errors)), _error(max(errors))
    return low if low == high else f"{low} to {high}"


def _error(value: float) -> str:
    return f"{value:.4f}" if value >= 5e-5 or value == 0 else f"{value:.0e}"


def compression_sheet(found: Compressed) -> Sheet:
    """The error of a compression, by branch and role."""
    lines: list[tuple[str, ...]] = [
        (part.branch, part.role, f"{part.norm:.4g}", _error(part.error)) for part in found.parts
    ]
    lines.append(("all", "", f"{found.norm:.4g}", _error(found.error)))
    notes = [f"{found.before:,} parameters before, {found.after:,} after"]
    notes += [_starts_note(stack, errors) for stack, errors in found.starts.items()]
    if found.left_out:
        notes.append(
            f"{found.left_out:,} trained parameters are no updates of these weights (biases, "
            "norms, embeddings, heads, gates) and are not in the new adapter"
        )
    if found.added:
        notes.append(f"{found.added:,} weights that had no update are adapted too, with zeros")
    return Sheet(
        f"{found.title} as {found.core} Aurora of rank {found.rank}",
        ("branch", "role", "||dW||", "relative error"),
        lines,
        "\n".join(notes),
    )


def _starts_note(stack: str, errors: Sequence[float]) -> str:
    if len(errors) == 1:
        return f"{stack}: error {_range(errors)}"
    return f"{stack}: errors of {len(errors)} starts {_range(errors)}"
