"""Fixed numbers that passes need on their device, and waiting for it."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_kept: dict[Hashable, Tensor] = {}


def constant(
    numbers: Any, device: torch.device | str | int, dtype: torch.dtype | None = None
) -> Tensor:
    """What `torch.tensor` makes of a number or a sequence of numbers, not to be changed.

    It is kept: sending numbers makes the host wait, and no CUDA graph can be recorded.
    """
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=dtype, device=device)
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    # Their text tells 1 from True and 0.0 from -0.0.
    key = repr(numbers), device, dtype, torch.get_default_dtype()
    found = _kept.get(key)
    if found is None:
        with torch.inference_mode(mode=False), waiting("default"):  # all kinds of passes use them
            found = _tensor(numbers, dtype=dtype, device=device)
        if type(found) is Tensor:  # not one that stands for a tensor while memory is counted
            _kept[key] = found
    return found


_tensor = torch.tensor  # while passes are recorded, `torch.tensor` is another


def is_constant(numbers: Any) -> bool:
    """Whether `constant` takes it: a number, or a flat sequence of numbers."""
    some = numbers if isinstance(numbers, (list, tuple)) else [numbers]
    return all(type(n) in (bool, int, float) for n in some)


@contextmanager
def waiting(mode: str) -> Iterator[None]:
    """While it lasts, waiting for a CUDA device is an error ("error"), or is not ("default")."""
    if not torch.cuda.is_initialized():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a prototype
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
