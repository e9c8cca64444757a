"""Measured steps as a table and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mmtune.bench.contestants import FLOOR, FULL, PEFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mmtune.bench.steps import Line

COLUMNS = (
    "", "step, ms", "/ floor", "/ full", "/ PEFT LoRA", "GPU busy, ms", "peak, GiB",
    "peak / floor", "trainable",
)  # fmt: skip
GIB = 2**30


def rows(lines: Sequence[Line]) -> list[list[str]]:
    """One row a contestant, with ratios to others of the same run."""
    by_name = {line.name: line for line in lines}

    def ratio(line: Line, other: str, of: Callable[[Line], float | None]) -> str:
        base = by_name.get(other)
        mine, its = of(line), None if base is None else of(base)
        return f"{mine / its:.2f}" if mine and its else ""

    found = []
    for line in lines:
        if line.step is None:
            found.append([line.name, f"not measured: {line.error}", *[""] * (len(COLUMNS) - 2)])
            continue
        time = line.step
        steps = [ratio(line, n, lambda x: x.step and x.step.median) for n in (FLOOR, FULL, PEFT)]
        found.append(
            [
                line.name,
                f"{time.median:.1f} [{time.low:.1f}, {time.high:.1f}]",
                *steps,
                "" if line.busy is None else f"{line.busy:.1f}",
                "" if line.peak is None else f"{line.peak / GIB:.2f}",
                ratio(line, FLOOR, lambda x: x.peak),
                f"{line.trainable:,}",
            ]
        )
    return found


def bars(lines: Sequence[Line]) -> str:
    """Step times as bars, the floor as a line, as an <svg> element."""
    from mmtune.report.plots import INK, LINE, drawing

    known = [line for line in lines if line.step is not None]

    def draw(axes: Axes) -> None:
        at = range(len(known))
        axes.barh(at, [x.step.median for x in known if x.step], color=LINE, height=0.6)
        axes.set_yticks(at, [x.name for x in known])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        for x in known:
            if x.name == FLOOR and x.step:
                axes.axvline(x.step.median, color=INK, linestyle="--", linewidth=1, alpha=0.6)
        axes.set_xlabel("milliseconds a step")

    return drawing("training steps", (8.4, 1.2 + 0.3 * len(known)), draw)
