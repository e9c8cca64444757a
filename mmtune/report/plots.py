"""Plots as SVG text that takes its colours from the page around it."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# matplotlib knows no "currentColor": text and axes are drawn in one odd colour, the line in
# another, and both are replaced by what the page's style sheet decides.
INK, LINE = "#010203", "#040506"


STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mmtune",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.labelcolor": INK,
}


def drawing(title: str, size: tuple[float, float], draw: Callable[[Axes], None]) -> str:
    """What `draw` puts on one pair of axes, as an <svg> element that scales with its container.

    Args:
        title: written above, and read out where pictures are not seen.
        size: width and height in inches.
        draw: draws with INK and LINE, which become the page's colours.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, loc="left", fontsize=12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.8)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text, count=1)
    label = html.escape(title, quote=True)
    text = text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return text.replace(INK, "currentColor").replace(LINE, "var(--accent)")


def curve(title: str, xs: Sequence[float], ys: Sequence[float]) -> str:
    """One line over optimiser steps, as `drawing` gives it."""

    def draw(axes: Axes) -> None:
        marker = "o" if len(xs) <= 25 else ""
        axes.plot(xs, ys, color=LINE, linewidth=1.8, marker=marker, markersize=3.5)
        axes.set_xlabel("step")
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))

    return drawing(title, (5.2, 2.9), draw)


def training_curves(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """Loss, learning rate and, where there are any, validation metrics over steps."""
    wanted = [("loss", "training loss"), ("learning_rate", "learning rate")]
    validation = sorted({key for line in log for key in line if key.startswith("eval_")})
    wanted += [(key, f"validation {key.removeprefix('eval_')}") for key in validation[:2]]
    found = []
    for key, title in wanted:
        points = [(line["step"], line[key]) for line in log if key in line]
        if points:
            xs, ys = zip(*points, strict=True)
            found.append(curve(title, xs, ys))
    return found
