"""How long things take: on the GPU by its own events, on the CPU by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of several runs: the median with its quartiles.

    Attributes:
        count: runs.
    """

    low: float
    median: float
    high: float
    count: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Timing:
        """Of one run or more."""
        low, median, high = quantiles([*times, *times], n=4, method="inclusive")
        return cls(low, median, high, len(times))

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.low:.4g}, {self.high:.4g}] ms"


def device_name(device: torch.device | str) -> str:
    """What tables call the device that was measured."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """How long one call takes, until the device has done all of it."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)


def timed(run: Callable[[], Any], device: torch.device, runs: int, warm: int = 3) -> Timing:
    """The time of a call that is made again and again.

    Args:
        run: the call.
        device: where it computes.
        runs: that are measured.
        warm: calls before, which are not.
    """
    for _ in range(warm):
        run()
    return Timing.of([milliseconds(run, device) for _ in range(runs)])
