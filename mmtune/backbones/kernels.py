"""Triton kernels; importing this needs Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

BLOCK = 4096


def quick_gelu(x: Tensor) -> Tensor:
    """Give x sigmoid(1.702 x), rounded after each operation as torch rounds it."""
    return _launched(_quick_gelu, x.contiguous())


def quick_gelu_backward(x: Tensor, dy: Tensor) -> Tensor:
    """Multiply dy by the derivative at x, in float32, rounded once."""
    return _launched(_quick_gelu_backward, x.contiguous(), dy.contiguous())


def _launched(kernel: Any, *inputs: Tensor) -> Tensor:
    """What an elementwise kernel makes of its inputs."""
    found, n = torch.empty_like(inputs[0]), inputs[0].numel()
    if n:
        with torch.cuda.device(found.device):
            kernel[(triton.cdiv(n, BLOCK),)](*inputs, found, n, BLOCK=BLOCK, num_warps=8)
    return found


@triton.jit
def _quick_gelu(x_at, y_at, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_at + at, at < n).to(tl.float32)
    scaled = _rounded(1.702 * x, y_at)
    gate = _rounded(_sigmoid(scaled), y_at)
    tl.store(y_at + at, (x * gate).to(y_at.dtype.element_ty), at < n)


@triton.jit
def _quick_gelu_backward(x_at, dy_at, dx_at, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_at + at, at < n).to(tl.float32)
    dy = tl.load(dy_at + at, at < n).to(tl.float32)
    gate = _sigmoid(1.702 * x)
    dx = dy * gate * (1 + 1.702 * x * (1 - gate))
    tl.store(dx_at + at, dx.to(dx_at.dtype.element_ty), at < n)


@triton.jit
def _sigmoid(x):
    """As CUDA's own exponential and division give it."""
    return tl.div_rn(1.0, 1.0 + libdevice.exp(-x))  # pyright: ignore[reportOperatorIssue]


@triton.jit
def _rounded(x, like_at):
    """To the dtype at a pointer, and back."""
    return x.to(like_at.dtype.element_ty).to(tl.float32)
