"""The pictures of an analysis."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from mmtune.report.plots import INK, LINE, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mmtune.analysis.running import Components, Measured, StackFacts
    from mmtune.analysis.tables import HeatMap

# How the three curves of a picture differ, without a colour of their own.
CURVES: tuple[dict[str, Any], ...] = (
    {"color": LINE, "linestyle": "-", "marker": "o"},
    {"color": LINE, "linestyle": "--", "marker": "s"},
    {"color": INK, "linestyle": ":", "marker": "^"},
)
NAMES = {"cp": "CP", "tucker": "Tucker", "svd": "SVD of every block"}


def heat_map(heat: HeatMap) -> str:
    """Norms as cells, from the smallest (lightest) to the largest of the branch."""
    from matplotlib.patches import Rectangle

    rows, columns = len(heat.layers), len(heat.projections)
    found = [norm for row in heat.norms for norm in row if norm is not None]
    smallest, span = min(found), (max(found) - min(found)) or 1.0

    def draw(axes: Axes) -> None:
        for y, row in enumerate(heat.norms):
            for x, norm in enumerate(row):
                if norm is None:
                    continue
                cell = Rectangle((x, y), 1, 1, facecolor=LINE, linewidth=0)
                cell.set_alpha(0.05 + 0.65 * (norm - smallest) / span)
                axes.add_patch(cell)
                axes.text(x + 0.5, y + 0.5, f"{norm:.2g}", ha="center", va="center", fontsize=9)
        axes.set_xlim(0, columns)
        axes.set_ylim(rows, 0)
        axes.set_xticks([x + 0.5 for x in range(columns)], heat.projections)
        axes.set_yticks([y + 0.5 for y in range(rows)], heat.layers)
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_ylabel("layer")

    size = (max(0.62 * columns + 1, 3.6), max(0.36 * rows + 1, 2.0))
    return drawing(f"||dW|| in {heat.branch}", size, draw)


def component_curve(found: Components) -> str:
    """The energy that the largest components hold together."""

    def draw(axes: Axes) -> None:
        together = list(accumulate(found.energies))
        axes.plot(range(1, len(together) + 1), together, color=LINE, linewidth=1.8)
        _levels(axes)
        axes.set_xlabel("largest components")

    return drawing(f"energy of the components, {found.factors}", (5.2, 2.9), draw)


def spectrum_curves(stack: StackFacts) -> str:
    """The squared norm that the first directions of each unfolding hold together."""

    def draw(axes: Axes) -> None:
        names = ("rows", "columns", "modes")
        for name, shares, style in zip(names, stack.spectra, CURVES, strict=True):
            line: dict[str, Any] = style | {"marker": ""}
            together = list(accumulate(shares))
            axes.plot(range(1, len(shares) + 1), together, linewidth=1.8, label=name, **line)
        _levels(axes)
        axes.set_xlabel("directions")
        axes.legend(frameon=False, loc="lower right")

    return drawing(f"spectrum of the unfoldings, {stack.stack}", (5.2, 2.9), draw)


def error_curves(stack: str, fits: Sequence[Measured]) -> str:
    """Error of the decompositions over the numbers that they store."""

    def draw(axes: Axes) -> None:
        for method, style in zip(NAMES, CURVES, strict=True):
            points = [(f.numbers, f.error) for f in fits if f.method == method]
            if points:
                xs, ys = zip(*sorted(set(points)), strict=True)
                axes.plot(xs, ys, linewidth=1.8, markersize=5, label=NAMES[method], **style)
        axes.set_xscale("log")
        sizes = _apart(sorted({f.budget for f in fits}))
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.set_xticks([], minor=True)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("numbers stored")
        axes.set_ylabel("relative error")
        axes.legend(frameon=False)

    return drawing(f"decompositions of the {stack} blocks", (5.2, 3.4), draw)


def _apart(sizes: Sequence[int]) -> list[int]:
    """Those of ascending sizes whose labels do not touch on a logarithmic axis."""
    kept: list[int] = []
    for size in sizes:
        if not kept or size > 1.4 * kept[-1]:
            kept.append(size)
    return kept


def _levels(axes: Axes) -> None:
    for level in (0.9, 0.99):
        axes.axhline(level, color=INK, linestyle="--", linewidth=0.8, alpha=0.5)
    axes.set_ylim(0, 1.03)
    axes.set_xlim(left=0)
