"""A backbone's Linears held in four bits (NF4, doubly quantised), through bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_blockwise
from torch import Tensor, nn

from mmtune.backbones.base import Backbone

# transformers' T5 casts its input to the dtype of a weight, unless that is int8.
STORAGE = torch.int8


class NF4Linear(bnb.nn.Linear4bit):
    """A frozen Linear whose weight is held as 4-bit indices with a scale for each 64 of them.

    bitsandbytes' own forward rounds the bias to the compute dtype in place, and on CPUs with
    AVX512-BF16 repacks the weight in place when it first evaluates. This one writes nothing.

    Shape: [..., d_in] -> [..., d_out], in the dtype of the input.
    """

    def __init__(self, linear: nn.Linear, compute_dtype: torch.dtype) -> None:
        super().__init__(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=compute_dtype,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=STORAGE,
            device="meta",
        )
        # open_clip asks its MLPs by this name for the dtype of their input.
        self.int8_original_dtype = linear.weight.dtype
        params: Any = bnb.nn.Params4bit
        # Moving a Params4bit to a device is what quantises it.
        weight = params(linear.weight.detach(), quant_type="nf4", quant_storage=STORAGE)
        self.weight = weight.to(linear.weight.device)
        self.bias = linear.bias
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        dtype: Any = self.compute_dtype
        weight: Any = self.weight
        state, packed = weight.quant_state, weight.view(torch.uint8)
        bias = None if self.bias is None else self.bias.to(dtype)
        if x.device.type == "cpu" and self.in_features % state.blocksize:
            y = F.linear(x.to(dtype), _unpacked(packed, state, dtype), bias)
        else:
            y = bnb.matmul_4bit(x.to(dtype), packed, bias=bias, quant_state=state)
        return y.to(x.dtype)


def _unpacked(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """The weight that is held, read as one long row.

    bitsandbytes 0.50's AVX512 kernel scales a block that two rows share by its neighbour's scale.
    """
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    read = torch.ops.bitsandbytes.dequantize_4bit
    row = read(packed, scales, state.blocksize, "nf4", (1, state.shape.numel()), dtype)
    return row.view(state.shape)


def quantise(
    backbone: Backbone, branches: Iterable[str] | None, compute_dtype: torch.dtype
) -> list[str]:
    """Replace, in place, the Linears of every layer of some branches by `NF4Linear`.

    Args:
        backbone: the view of a prepared model. Embeddings, norms, heads and biases stay as they
            are.
        branches: names of branches; None means all.
        compute_dtype: of the matrix products.

    Returns:
        The paths of the Linears that were replaced; none that was before.
    """
    chosen = [
        site
        for site in backbone.select(None if branches is None else list(branches))
        if site.layer is not None and type(site.module) in _LINEARS
    ]
    for site in chosen:
        parent, _, name = site.path.rpartition(".")
        linear: Any = site.module
        setattr(backbone.model.get_submodule(parent), name, NF4Linear(linear, compute_dtype))
    return [site.path for site in chosen]


# nn.MultiheadAttention's out_proj is a class of its own.
_LINEARS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
