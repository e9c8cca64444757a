"""Numbers of a run as text: metrics with intervals, parameters, bytes, seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmtune.runs import Results
    from mmtune.tasks.base import Metric

LOWER_IS_BETTER = ("MdR", "MnR")  # median and mean rank


@dataclass(frozen=True)
class Row:
    """One line of the results table, as text; `sign` is that of `sign()`."""

    name: str
    before: str
    after: str
    difference: str
    interval: str
    sign: int


def rows(results: Results) -> list[Row]:
    """The results table: every metric before, after, and their paired difference."""
    found = []
    for name, after in results.after.items():
        before, difference = results.before.get(name), results.difference.get(name)
        found.append(
            Row(
                name=name,
                before=with_interval(before) if before else "",
                after=with_interval(after),
                difference=f"{difference.value:+.1f}" if difference else "",
                interval=interval(difference, "+") if difference else "",
                sign=sign(name, difference) if difference else 0,
            )
        )
    return found


def sign(name: str, difference: Metric) -> int:
    """1 for better, -1 for worse, where the 95 % interval is clear of zero; else 0."""
    better = -1 if name.split()[-1] in LOWER_IS_BETTER else 1
    return better if difference.low > 0 else -better if difference.high < 0 else 0


def interval(metric: Metric, flag: str = "") -> str:
    """[low, high] with one decimal; flag "+" writes signs."""
    return f"[{metric.low:{flag}.1f}, {metric.high:{flag}.1f}]"


def with_interval(metric: Metric) -> str:
    """Value and interval, such as "36.2 [32.0, 40.4]"."""
    return f"{metric.value:.1f} {interval(metric)}"


def size(count: int) -> str:
    """Bytes in the largest binary unit that leaves at least 1, such as "240 KiB" or "1.28 MiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def duration(seconds: float) -> str:
    """Seconds as "42 s", "3 min 20 s" or "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def share(results: Results) -> str:
    """Trainable share in percent, with two significant digits at least."""
    return percent(results.share)


def percent(value: float) -> str:
    """A percentage with two decimals, or two significant digits below 0.1."""
    return f"{value:.2f} %" if value >= 0.1 else f"{value:.2g} %"


@dataclass(frozen=True)
class Fact:
    """Something a run cost: a label, the number, and what belongs beside it."""

    label: str
    value: str
    detail: str = ""


def facts(results: Results) -> list[Fact]:
    """What a run cost, in the order of importance."""
    return [
        Fact("trainable parameters", f"{results.trainable:,}", f"of {results.total:,}"),
        Fact("share", share(results), "of all parameters"),
        Fact("training time", duration(results.seconds), f"{results.steps:,} steps"),
        Fact("peak memory", size(results.peak_memory), results.memory_kind),
    ]
