"""QLoRA: PEFT's LoRA on a base whose weights are held in four bits."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

import torch
from peft import LoraConfig, LoraModel, PeftConfig
from torch import nn

from mmtune.backbones import backbone_of
from mmtune.tuners.presets import LoraOptions, aimed
from mmtune.tuners.registry import Method

NAME = "QLORA"


@dataclass
class QLoraOptions(LoraOptions):
    """QLoRA: LoRA with the paper's rank, beside weights that are held in four bits.

        NF4(W) x + (alpha / rank) B A x,    A [rank, d_in] drawn, B [d_out, rank] zero at the start

    Trainable parameters: rank (d_in + d_out) for each adapted weight. The Linears of all layers of
    the chosen branches are quantised, adapted or not: 4.127 bits for each of their weights.

    Attributes:
        rank, alpha, dropout, branches, sites, layers, branch_ranks, rslora: see `LoraOptions`.
        compute_dtype: in which quantised weights are multiplied.
    """

    rank: int = 64
    sites: list[str] | dict[str, list[str]] = field(
        default_factory=lambda: ["q", "k", "v", "out", "fc1", "fc2"]
    )
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"


@dataclass
class QLoraConfig(LoraConfig):
    """PEFT's LoraConfig and how the base is held.

    Args:
        branches: branches whose Linears are quantised; None means all.
        compute_dtype: in which quantised weights are multiplied.
        quantise: False leaves the base as it is, so that the adapter can be merged into it. The
            adapter was trained to sit on the quantised weights; outputs differ by their error.
    """

    branches: list[str] | None = None
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    quantise: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NAME  # pyright: ignore[reportAttributeAccessIssue]


class QLoraModel(LoraModel):
    """PEFT's LoraModel, which quantises the base before the first adapter is put on it."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> PeftConfig:
        backbone_of(self.model).prepare()
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        if peft_config.quantise:
            quantise(model, peft_config.branches, peft_config.compute_dtype)

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        # PEFT looks for 4-bit layers only in models that say so of themselves.
        kwargs["loaded_in_4bit"] = True
        module = LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        if hasattr(target, "int8_original_dtype"):
            module.int8_original_dtype = target.int8_original_dtype
        return module

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        configs: Any = self.peft_config.values()
        if any(config.quantise for config in configs):
            raise ValueError(
                f"{NAME} cannot be merged: a merged weight would be rounded to four bits again. "
                "Load the adapter onto weights that are not quantised, with "
                "mmtune.load_adapter(model, path, quantise=False), and merge there."
            )


def qlora_config(
    model: nn.Module, options: QLoraOptions | None = None, **settings: Any
) -> QLoraConfig:
    """The QLoraConfig for the chosen sites of `model`, whose fused attention it splits.

    The model is quantised, in place, when the adapter is put on it: `get_peft_model`,
    `PeftModel.from_pretrained` and `mmtune.load_adapter` take the stock model.

    Args:
        model: a stock model that some backbone describes.
        options: the settings; or give them by keyword.
        **settings: fields of QLoraOptions.

    Raises:
        ImportError: bitsandbytes is not installed.

    Source:
        QLoRA, arXiv 2305.14314; NF4 and double quantisation are bitsandbytes', LoRA is PEFT's.
        The paper's third part, paged optimiser state, is `training.optimizer: paged_adamw`.
    """
    chosen = options if options is not None else QLoraOptions(**settings)
    _require_bitsandbytes()
    return QLoraConfig(
        **aimed(model, chosen, "qlora"),
        branches=chosen.branches,
        compute_dtype=chosen.compute_dtype,
    )


def quantise(
    model: nn.Module, branches: list[str] | None = None, compute_dtype: str = "bfloat16"
) -> list[str]:
    """Hold the Linears of every layer of `model` in four bits, in place; as QLoRA does.

    Returns:
        The paths of the Linears that were replaced.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    _require_bitsandbytes()
    from mmtune.backbones.nf4 import quantise as quantise_backbone

    backbone = backbone_of(model)
    backbone.prepare()
    return quantise_backbone(backbone, branches, getattr(torch, compute_dtype))


def _require_bitsandbytes() -> None:
    if find_spec("bitsandbytes") is None:
        raise ImportError(
            "qlora holds weights in four bits through bitsandbytes, which is not installed. "
            "Run `pip install mmtune[qlora]`."
        )


PEFT_METHODS = {NAME: (QLoraConfig, QLoraModel)}
METHODS = (
    Method(
        name="qlora",
        summary="LoRA on a base held in four bits (bitsandbytes' NF4)",
        source="arXiv 2305.14314 (NeurIPS 2023)",
        options=QLoraOptions,
        build=qlora_config,
    ),
)
