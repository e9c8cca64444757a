"""How long an optimiser step takes: forward, backward and update, without waiting for data."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import TrainerCallback


class StepTimes(TrainerCallback):
    """Times every optimiser step of a training run.

    On CUDA the device's own clock is read after training, so that timing delays no step.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[Any, Any]] = []
        self.begun: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.marks.append((self.begun, self._now()))

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def median(self) -> float | None:
        """Seconds of the median step; None where this process took no step."""
        if not self.marks:
            return None
        if not self.cuda:
            return statistics.median(end - begin for begin, end in self.marks)
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) / 1000 for begin, end in self.marks)
