"""What the host asks a device for in a pass, noted once and answered from the notes later."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmtune.constants import constant, waiting


class Questions(TorchDispatchMode):
    """Notes the numbers that a device is asked for, or answers as noted and has that checked.

    Two operations that make the host wait without asking for a number (`where` with a fixed one,
    the gradient of `masked_scatter`) are computed otherwise, with the same result.

    Args:
        device: that is asked.
        known: answers noted earlier, in this order; None lets the device answer.

    Attributes:
        answers: that were given, in order.
    """

    def __init__(self, device: torch.device, known: list[Any] | None = None) -> None:
        super().__init__()
        self.answers: list[Any] = []
        self._device, self._known = device, known
        self._right = [torch.ones(1, dtype=torch.bool, device=device)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.masked_scatter_backward.default:
            return _taken_in_order(*args)
        if func is torch.ops.aten.where.self:  # it would send a scalar, and wait
            args = [_brought(a, args[0].device) for a in args]
        asks = func is torch.ops.aten._local_scalar_dense.default
        if not asks or args[0].device.type != self._device.type:
            return func(*args, **(kwargs or {}))
        if self._known is None:
            with waiting("default"):
                self.answers.append(func(*args))
        elif len(self.answers) == len(self._known):
            raise RuntimeError("this pass asks the device for more than the one before it")
        else:
            self.answers.append(self._known[len(self.answers)])
            self._right.append((args[0] == self.answers[-1]).reshape(1))
        return self.answers[-1]

    def right(self) -> Tensor:
        """[1] bool, on the device: whether it would have answered as it was answered for."""
        if self._known is not None and len(self.answers) != len(self._known):
            raise RuntimeError("this pass asks the device for less than the one before it")
        return torch.cat(self._right).all()[None]


def _brought(scalar: Tensor, device: torch.device) -> Tensor:
    """A fixed number of the host, as the device has it; other tensors as they are."""
    if scalar.dim() or scalar.device == device or scalar.device.type != "cpu":
        return scalar
    return constant(scalar.item(), device, scalar.dtype)


def _taken_in_order(gradient: Tensor, mask: Tensor, size: Sequence[int]) -> Tensor:
    """The gradient of what `masked_scatter` put at a mask; torch's own asks how much that is."""
    mask = mask.expand_as(gradient).flatten()
    count = math.prod(size)
    place = torch.where(mask, mask.cumsum(0) - 1, count)
    taken = gradient.new_zeros(count + 1)
    return taken.scatter_(0, place.clamp_(max=count), gradient.flatten())[:count].view(size)
