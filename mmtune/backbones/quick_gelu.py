"""CLIP's activation x sigmoid(1.702 x) in one kernel that keeps x alone for backward.

transformers and open_clip write it as three operations, which keep two tensors as wide as the MLP
and read and write such tensors 21 times, forward and backward. One kernel needs 5 of these, and
keeps one tensor: a sixth of the GPU time of CLIP ViT-L/14's floor, and a quarter of its memory.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mmtune.backbones.base import hooked

log = logging.getLogger(__name__)

SCALE = 1.702
DONE = "mmtune_quick_gelu"  # attribute of a model
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STOCK = {"transformers.activations.QuickGELUActivation", "open_clip.transformer.QuickGELU"}


class QuickGelu(nn.Module):
    """x sigmoid(1.702 x), bit for bit what the stock module gives.

    Its gradient is computed in float32 and rounded once where the kernel runs (a CUDA device with
    Triton); elsewhere it is the stock one, bit for bit, and can be differentiated again.

    Args:
        stock: the module in whose place this stands.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "stock", stock)  # it has no parameters; nothing to register
        self.train(stock.training)

    def forward(self, x: Tensor) -> Tensor:
        # A compiler fuses the operations, and chooses what is kept, by itself.
        if torch.compiler.is_compiling():
            return _formula(x)
        return _QuickGelu.apply(x)


def _formula(x: Tensor) -> Tensor:
    return x * torch.sigmoid(SCALE * x)


class _QuickGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        kernels = _kernels_for(x)
        return _formula(x) if kernels is None else kernels.quick_gelu(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        kernels = None if torch.is_grad_enabled() else _kernels_for(x)
        if kernels is not None:
            return kernels.quick_gelu_backward(x, dy)
        y = torch.sigmoid(SCALE * x)
        return dy * y + SCALE * torch.ops.aten.sigmoid_backward(dy * x, y)


def quicken(model: nn.Module) -> None:
    """Put `QuickGelu` in the place of the stock modules, but of those that hooks watch; once."""
    if getattr(model, DONE, False):
        return
    setattr(model, DONE, True)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            kind = type(child)
            if f"{kind.__module__}.{kind.__name__}" in STOCK and not hooked(child):
                setattr(parent, name, QuickGelu(child))


def slow(model: nn.Module) -> None:
    """Put the stock modules back."""
    setattr(model, DONE, False)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, QuickGelu):
                setattr(parent, name, child.stock)


def _kernels_for(x: Tensor) -> ModuleType | None:
    """The kernels, where they can be had for a tensor: not for one that only stands for another."""
    real = x.is_cuda and type(x) in (Tensor, nn.Parameter) and x.dtype in DTYPES
    return _kernels(x.device) if real else None


@cache
def _kernels(device: torch.device) -> ModuleType | None:
    if find_spec("triton") is None:
        return None
    from mmtune.backbones import kernels

    try:
        kernels.quick_gelu(torch.zeros(1, device=device))
    except Exception as error:  # no compiler, an old device, a driver that is too old: many kinds
        log.warning("QuickGELU takes three kernels, since Triton cannot compile here: %s", error)
        return None
    return kernels
