"""Plots as SVG text that takes its colours from the page around it."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

# matplotlib knows no "currentColor": text and axes are drawn in one odd colour, the line in
# another, and both are replaced by what the page's style sheet decides.
_INK, _LINE = "#010203", "#040506"


def curve(title: str, xs: Sequence[float], ys: Sequence[float]) -> str:
    """One line over optimiser steps, as an <svg> element that scales with its container."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "mmtune",
        "font.family": "sans-serif",
        "font.size": 11,
        "axes.edgecolor": _INK,
        "text.color": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.labelcolor": _INK,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.2, 2.9), layout="constrained")
        axes = figure.add_subplot()
        marker = "o" if len(xs) <= 25 else ""
        axes.plot(xs, ys, color=_LINE, linewidth=1.8, marker=marker, markersize=3.5)
        axes.set_title(title, loc="left", fontsize=12)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=_INK, alpha=0.13, linewidth=0.8)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text, count=1)
    label = html.escape(title, quote=True)
    text = text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return text.replace(_INK, "currentColor").replace(_LINE, "var(--accent)")


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
