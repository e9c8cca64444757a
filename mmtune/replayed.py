"""Steps of a loop that a CUDA device is sent as a whole, once they have been recorded.

A short step waits for Python, which sends its kernels one by one; a CUDA graph is sent at once.
What the host asks the device for in a pass (`int(mask.sum())`) is answered in the recording as it
was answered before, and asked again on the device in every replay: where an answer would be
another, that pass counts for nothing, and all are plain from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mmtune.constants import constant, is_constant, waiting
from mmtune.questions import Questions

# Of each device a graph of a loop that is over: its memory is what the next one records into.
_over: dict[torch.device, Any] = {}


class Steps:
    """A loop's steps: on a CUDA device two are plain, and later ones are replayed if they can be.

    Both functions must do the same with the same tensors each time; the numbers are then those of
    plain steps. Used as a context manager, it leaves its memory to the next loop.

    Args:
        gradients: sets the gradients anew and gives the 1-D tensor of what the host must know.
        update: follows them, without waiting for the device. Of torch's optimisers those that are
            `capturable` can be recorded.
        device: where both compute.
        replays: False keeps all steps plain.
    """

    def __init__(
        self,
        gradients: Callable[[], Tensor],
        update: Callable[[], object],
        device: torch.device,
        replays: bool = True,
    ) -> None:
        self._gradients, self._update, self._device = gradients, update, device
        self._recordable = replays and device.type == "cuda"
        self._pass: tuple[Any, Any] | None = None
        self._change: tuple[Any, Any] | None = None
        self._passes, self._answers, self._simple = 0, list[Any](), False

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pass is not None:
            _over[self._device] = self._pass[0]
        self._recordable, self._pass, self._change = False, None, None

    @property
    def replays(self) -> bool:
        """Whether gradients come from a recording by now."""
        return self._pass is not None

    def gradients(self) -> list[float]:
        """Compute the gradients. Returns the numbers, for which the device is waited for once."""
        self._passes += 1
        found = None
        try:
            if self._recordable and self._passes == 2:
                # What cannot be recorded fails here: a recording that fails leaves traces in torch.
                with trial(self._device) as asked:
                    found = self._gradients()
                self._answers = asked.answers
            elif self._recordable and self._passes == 3:
                self._pass = self._recorded(self._gradients, self._answers)
        except RuntimeError:  # the plain pass below says what else may be wrong
            self._recordable = False
        if self._pass is not None:
            self._pass[0].replay()
            *numbers, right = self._pass[1].tolist()
            if right:
                return numbers
            self._recordable, self._pass, self._change = False, None, None
        return (self._gradients() if found is None else found).tolist()

    def update(self) -> None:
        """Follow the gradients."""
        if self._recordable and self._passes == 2:
            with _aside(self._device), Questions(self._device) as asked:
                self._update()
            self._simple = not asked.answers
            return
        if self._pass is not None and self._passes == 3 and self._simple:
            with suppress(RuntimeError):  # nothing of it has been done
                self._change = self._recorded(self._update, [])
        if self._change is None:
            self._update()
        else:
            self._change[0].replay()

    def _recorded(self, run: Callable[[], Any], answers: list[Any]) -> tuple[Any, Any]:
        """(a graph, what the function returned, with whether the answers are right behind it)."""
        graph = torch.cuda.CUDAGraph()
        earlier = _over.pop(self._device, None) if self._pass is None else self._pass[0]
        pool = None if earlier is None else earlier.pool()
        with recording(self._device), capture(graph, pool):
            with Questions(self._device, answers) as asked:
                found = run()
            if isinstance(found, Tensor):
                found = torch.cat([found, asked.right().to(found)])
        return graph, found


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """Work on a stream of its own, as recordings must be, in order with what is around it."""
    here, side = torch.cuda.current_stream(device), _side(device)
    side.wait_stream(here)
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        here.wait_stream(side)


@contextmanager
def trial(device: torch.device) -> Iterator[Questions]:
    """Where a pass that cannot be recorded fails, before a recording of it could."""
    with _aside(device), constants_kept(), waiting("error"), Questions(device) as asked:
        yield asked


@contextmanager
def recording(device: torch.device) -> Iterator[None]:
    """What a pass must compute in while it is recorded, around `capture`."""
    with _aside(device), _unseen(), constants_kept():
        yield


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Record into a graph what is launched, with memory from a pool (None: one of its own)."""
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        yield
    finally:
        graph.capture_end()


@contextmanager
def _unseen() -> Iterator[None]:
    """Hides a recording from libraries that compute otherwise where they see one (masks)."""
    with patch.object(torch.cuda, "is_current_stream_capturing", lambda: False):
        yield


@contextmanager
def constants_kept() -> Iterator[None]:
    """Fixed numbers are copied on the device rather than sent to it again (`torch.tensor(0.0)`)."""
    stock = torch.tensor

    def tensor(data: Any, **options: Any) -> Tensor:
        device = torch.device(options.get("device") or torch.get_default_device())
        if device.type != "cuda" or options.keys() - {"device", "dtype"} or not is_constant(data):
            return stock(data, **options)
        return constant(data, device, options.get("dtype")).clone()

    with patch.object(torch, "tensor", tensor):
        yield
