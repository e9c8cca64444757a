"""The pictures of a comparison: quality against trained parameters, and each method's losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.transforms import Bbox

from mmtune.metrics.seeds import SeedMean
from mmtune.report.plots import INK, LINE, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

# Where a label may stand: (x, y) in points from its dot, and which side of the text is there.
PLACES = ((7, 0, "left"), (-7, 0, "right"), (0, 9, "center"), (0, -9, "center"),
          (7, 10, "left"), (-7, 10, "right"), (7, -10, "left"), (-7, -10, "right"))  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One method of the scatter plot."""

    name: str
    trainable: int
    quality: SeedMean


def scatter(metric: str, points: Sequence[Point], base: float) -> str:
    """Quality over trained parameters (logarithmic), the base model as a dashed line."""

    def draw(axes: Axes) -> None:
        for point in points:
            axes.errorbar(
                point.trainable,
                point.quality.value,
                yerr=point.quality.half,
                fmt="o",
                color=LINE,
                markersize=6,
                capsize=3,
                elinewidth=1.2,
            )
        axes.axhline(base, color=INK, linestyle="--", linewidth=1, alpha=0.6)
        axes.set_xscale("log")
        axes.set_xlabel("trained parameters")
        axes.margins(x=0.16, y=0.12)
        axes.text(
            0.005, base, "base", va="bottom", fontsize=10, transform=axes.get_yaxis_transform()
        )
        _label(axes, points)

    return drawing(f"{metric} and trained parameters", (8.4, 4.4), draw)


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """Name each dot where its name covers the least: dots and names first, then error bars."""
    figure: Any = axes.figure
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    solid = [_dot(axes, point) for point in points]
    bars = [_bar(axes, point) for point in points]

    def cost(box: Bbox) -> int:
        outside = not (frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1))
        return 100 * outside + 10 * box.count_overlaps(solid) + box.count_overlaps(bars)

    for point in points:
        tried = [_name(axes, point, place) for place in PLACES]
        best = min(tried, key=lambda text: cost(text.get_window_extent()))
        solid.append(best.get_window_extent())
        for text in tried:
            if text is not best:
                text.remove()


def _name(axes: Axes, point: Point, place: tuple[float, float, str]) -> Annotation:
    x, y, side = place
    return axes.annotate(
        point.name,
        (point.trainable, point.quality.value),
        (x, y),
        textcoords="offset points",
        ha=side,
        va="center",
        fontsize=10,
    )


def _dot(axes: Axes, point: Point) -> Bbox:
    x, y = axes.transData.transform((point.trainable, point.quality.value))
    return Bbox([[x - 6, y - 6], [x + 6, y + 6]])


def _bar(axes: Axes, point: Point) -> Bbox:
    mean, half = point.quality.value, point.quality.half or 0.0
    ends = [(point.trainable, y) for y in (mean - half, mean + half)]
    (x, low), (_, high) = axes.transData.transform(ends)
    return Bbox([[x - 3, low], [x + 3, high]])


def losses(curves: dict[str, list[list[tuple[int, float]]]]) -> list[str]:
    """One picture per method, a line per seed, all with the same axes.

    Args:
        curves: method -> seeds -> (step, training loss).
    """
    points = [point for seeds in curves.values() for line in seeds for point in line]
    if not points:
        return []
    lowest = min(loss for _, loss in points)
    highest = max(loss for _, loss in points)
    last = max(step for step, _ in points)
    room = 0.05 * (highest - lowest or 1)

    def picture(name: str, seeds: list[list[tuple[int, float]]]) -> str:
        def draw(axes: Axes) -> None:
            for line in seeds:
                axes.plot(*zip(*line, strict=True), color=LINE, linewidth=1.5, alpha=0.7)
            axes.set_xlim(0, last)
            axes.set_ylim(lowest - room, highest + room)
            axes.set_xlabel("step")

        return drawing(name, (4.2, 2.5), draw)

    drawn = {name: [line for line in seeds if line] for name, seeds in curves.items()}
    return [picture(name, seeds) for name, seeds in drawn.items() if seeds]
