"""Runs as one HTML file: the list, headline numbers as bars, and losses in one picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mmtune.report.html import fill
from mmtune.run_listing.base import Curve, Number, Run
from mmtune.run_listing.comparing import (
    difference_rows,
    headline,
    number_rows,
    seconds,
    trainable,
)
from mmtune.run_listing.listing import interval_of
from mmtune.runs import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = "runs.html"
# Lines that must be told apart, on a light and on a dark page.
COLOURS = ("#2f7fd1", "#d9762b", "#2a9d62", "#c44e8a", "#8a63d2", "#a98f17", "#3fa3a3", "#a3624a")
STYLES = ("-", "--", ":", "-.")
COLUMNS = ("run", "kind", "state", "headline", "trainable", "time", "started", "commit")


def write_page(runs: Sequence[Run], root: Path, compared: bool = False) -> Path:
    """Write runs.html into a folder; returns its path.

    Args:
        runs: that are shown.
        root: the folder.
        compared: also show how the configs differ, and every number.
    """
    write_text(root / PAGE, render_page(runs, root, compared))
    return root / PAGE


def render_page(runs: Sequence[Run], root: Path, compared: bool = False) -> str:
    """The page; links to reports lead from `root`."""
    names = [run.name for run in runs]
    tables = []
    if compared:
        tables = [
            ("What differs in the configs", ["key", *names], difference_rows(runs)),
            ("Numbers", ["number", *names], number_rows(runs)),
        ]
    return fill(
        "runs.html",
        title=root.name or "runs",
        summary=f"{len(runs)} run{'s' if len(runs) != 1 else ''}",
        header=COLUMNS,
        lines=[_line(run, root) for run in runs],
        remarks=[(run.name, run.state, run.why) for run in runs if run.why],
        tables=[(title, header, rows) for title, header, rows in tables if rows],
        bars=all_bars(runs),
        curves=all_curves(runs),
    )


def _line(run: Run, root: Path) -> dict[str, Any]:
    link = quote(os.path.relpath(run.report, root)) if run.report else ""
    day = run.started[:16].replace("T", " ")
    cells = [run.kind, run.state, headline(run), trainable(run), seconds(run), day, run.commit]
    return {"name": run.name, "link": link, "cells": cells}


def all_bars(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(picture, what its intervals are), one for each kind of run and headline metric."""
    groups: dict[tuple[str, str], list[tuple[str, Number]]] = {}
    for run in runs:
        if run.headline is None:
            continue
        what = run.headline.what
        groups.setdefault((run.kind, what), []).extend(
            (f"{run.name}: {number.of}" if number.of else run.name, number)
            for number in run.numbers
            if number.what == what
        )
    return [
        (bars(f"{kind}: {what}", numbers), interval_of(kind) if _spread(numbers) else "")
        for (kind, what), numbers in groups.items()
    ]


def _spread(numbers: Sequence[tuple[str, Number]]) -> bool:
    return any(number.low is not None for _, number in numbers)


def bars(title: str, numbers: Sequence[tuple[str, Number]]) -> str:
    """A bar a number with its interval, as an <svg> element."""
    from mmtune.report.plots import INK, LINE, drawing

    def draw(axes: Axes) -> None:
        at = range(len(numbers))
        axes.barh(at, [n.value for _, n in numbers], color=LINE, height=0.6, alpha=0.75)
        for y, (_, number) in enumerate(numbers):
            if number.low is not None and number.high is not None:
                axes.plot([number.low, number.high], [y, y], color=INK, linewidth=1.6)
        axes.set_yticks(at, [_short(name) for name, _ in numbers])
        axes.set_ylim(len(numbers) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(numbers[0][1].unit)
        if all(n.unit == "%" for _, n in numbers):
            axes.set_xlim(0, 102)

    return drawing(title, (8.4, 1.2 + 0.3 * len(numbers)), draw)


def all_curves(runs: Sequence[Run]) -> list[str]:
    """A picture for each objective: losses of others are not to be compared."""
    groups: dict[tuple[str, str], list[tuple[str, Curve]]] = {}
    for run in runs:
        if run.curve:
            groups.setdefault((run.kind, run.objective), []).append((run.name, run.curve))
    return [
        overlaid(f"{kind}: training loss, {objective}", curves)
        for (kind, objective), curves in groups.items()
    ]


def overlaid(title: str, curves: Sequence[tuple[str, Curve]]) -> str:
    """Losses over steps, a line a run, as an <svg> element."""
    from mmtune.report.plots import drawing

    def draw(axes: Axes) -> None:
        for number, (name, curve) in enumerate(curves):
            xs, ys = zip(*curve, strict=True)
            axes.plot(
                xs,
                ys,
                color=COLOURS[number % len(COLOURS)],
                linestyle=STYLES[number // len(COLOURS) % len(STYLES)],
                marker="o" if len(xs) == 1 else "",
                linewidth=1.6,
                label=_short(name),
            )
        axes.set_xlabel("step")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=10)

    return drawing(title, (8.4, max(3.4, 0.8 + 0.24 * len(curves))), draw)


def _short(name: str) -> str:
    """A label that leaves room for what it labels; "_" first would hide it from a legend."""
    text = name if len(name) <= 36 else f"{name[:17]}…{name[-18:]}"
    return text if not text.startswith("_") else f" {text}"
