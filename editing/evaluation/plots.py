"""The pictures of an evaluation: bars per metric, and what becomes of each as edits pile up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from editing.config import UNEDITED
from editing.evaluation.tables import columns
from mmtune.report.plots import INK, LINE, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from editing.evaluation.summary import Key, Report, RowSummary

MARKERS = "osDv^P*X<>"
# After the page's accent, colours that can be told apart on white and on black.
COLOURS = (LINE, "#cf7a2a", "#2f9a6b", "#a266cf", "#c4527a", "#8a8f2c", "#3a9fb5", "#9a6a4f")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))


def bars(report: Report) -> list[str]:
    """One picture per column: a bar per row, with its interval, after the most edits."""
    last = max(row.count for row in report.rows)
    rows = [row for row in report.rows if row.count == last]
    return [_bars(name, key, rows) for name, key in columns(report).items()]


def count_curves(report: Report) -> list[str]:
    """One picture per column: a line per row over the number of edits; none for one number."""
    if len({row.count for row in report.rows}) < 2:
        return []
    return [_curves(name, key, report.rows) for name, key in columns(report).items()]


def _bars(name: str, key: Key, rows: Sequence[RowSummary]) -> str:
    there = [row for row in rows if key in row.metrics]

    def draw(axes: Axes) -> None:
        axes.grid(visible=False)
        axes.grid(axis="x", color=INK, alpha=0.13, linewidth=0.8)
        for place, row in enumerate(there):
            found = row.metrics[key].macro
            base = row.name == UNEDITED
            axes.barh(
                place,
                100 * found.value,
                height=0.62,
                color=INK if base else LINE,
                alpha=0.3 if base else 0.75,
            )
            axes.plot([100 * found.low, 100 * found.high], [place, place], color=INK, linewidth=1.4)
        axes.set_yticks(range(len(there)), [row.name for row in there])
        axes.set_ylim(len(there) - 0.4, -0.6)
        axes.set_xlim(0, 100)

    return drawing(f"{name}, %", (4.4, 0.9 + 0.34 * len(there)), draw)


def _curves(name: str, key: Key, rows: Sequence[RowSummary]) -> str:
    by_name: dict[str, list[RowSummary]] = {}
    for row in rows:
        if key in row.metrics:
            by_name.setdefault(row.name, []).append(row)

    def draw(axes: Axes) -> None:
        edited = 0
        for label, own in by_name.items():
            base = label == UNEDITED
            colour = INK if base else COLOURS[edited % len(COLOURS)]
            counts = [row.count for row in own]
            found = [row.metrics[key].macro for row in own]
            axes.plot(
                counts,
                [100 * m.value for m in found],
                color=colour,
                alpha=0.5 if base else 1,
                linestyle=":" if base else DASHES[edited % len(DASHES)],
                marker="" if base else MARKERS[edited % len(MARKERS)],
                markersize=5,
                linewidth=1.6,
                label=label,
            )
            if not base:
                low, high = ([100 * getattr(m, end) for m in found] for end in ("low", "high"))
                axes.fill_between(counts, low, high, color=colour, alpha=0.1, linewidth=0)
                edited += 1
        axes.set_xscale("log")
        numbers = sorted({row.count for row in rows})
        axes.set_xticks(numbers, [str(n) for n in numbers])
        axes.minorticks_off()
        axes.set_ylim(-3, 103)
        axes.set_xlabel("edits")
        axes.legend(
            frameon=False,
            fontsize=9,
            labelcolor=INK,
            loc="upper left",
            bbox_to_anchor=(1, 1),
            borderaxespad=0,
        )

    # As high as what stands beside it: a legend is 0.2 inches a line.
    return drawing(f"{name}, %", (5.2, max(2.8, 0.6 + 0.2 * len(by_name))), draw)
