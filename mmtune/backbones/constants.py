"""Fixed numbers that passes need on their device."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

_kept: dict[Hashable, Tensor] = {}


def constant(numbers: Sequence[int], device: torch.device) -> Tensor:
    """A 1-D tensor of integers or bools, not to be changed.

    A CUDA device keeps it: sending numbers makes the host wait, and no CUDA graph can be recorded.
    """
    if device.type != "cuda":
        return torch.tensor(numbers, device=device)
    key = tuple(numbers), [type(n) for n in numbers[:1]] == [bool], device
    found = _kept.get(key)
    if found is None:
        with torch.inference_mode(mode=False):  # passes with gradients use them as well
            found = torch.tensor(numbers, device=device)
        if type(found) is Tensor:  # not one that stands for a tensor while memory is counted
            _kept[key] = found
    return found
