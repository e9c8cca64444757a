"""What is measured side by side: the floor, full fine-tuning, PEFT's LoRA, and every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mmtune.backbones.quick_gelu import slow
from mmtune.bench.subjects import view_of

if TYPE_CHECKING:
    from torch import nn

FLOOR, FULL, PEFT = "floor", "full", "peft-lora"
EVERY = ["q", "k", "v", "out"]
# Settings of methods that have more than their defaults, or need some.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "aurora": {"rank": 64, "sites": EVERY},
    "lora": {"rank": 64, "sites": EVERY},
    "adapter_drop": {"drop": 2},
    "adapter_fusion": {"adapters": {"a": "random:0", "b": "random:1"}},
}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "aurora-separate": {"rank": 64, "sites": EVERY, "compute": "separate"},
    "aurora-mlp": {"rank": 64, "sites": [*EVERY, "fc1", "fc2"]},
}


@dataclass(frozen=True)
class Contestant:
    """A way to train a model.

    Attributes:
        summary: one line.
        make: stock model -> what trains; parameters that want gradients are those that train.
    """

    summary: str
    make: Callable[[nn.Module], nn.Module]


def contestants() -> dict[str, Contestant]:
    """All of them by name: what the methods are compared with, then the methods."""
    from mmtune.tuners.registry import methods

    found = {
        FLOOR: Contestant("forward and backward to the embeddings, nothing trains", _floor),
        "floor-prepared": Contestant(
            "the same with QuickGELU in one kernel, as methods have it",
            partial(_floor, stock=False),
        ),
        FULL: Contestant("everything trains", lambda model: model.requires_grad_(True)),
        PEFT: Contestant("PEFT's LoRA as it comes, r 64", partial(_peft_lora, autocast=True)),
        "peft-lora-bf16": Contestant(
            "the same with autocast_adapter_dtype=False", partial(_peft_lora, autocast=False)
        ),
    }
    for name in sorted(methods()):
        make = partial(_method, name, SETTINGS.get(name, {}))
        found[name] = Contestant(methods()[name].summary, make)
    for name, settings in VARIANTS.items():
        found[name] = Contestant(f"aurora: {settings}", partial(_method, "aurora", settings))
    return found


def _floor(model: nn.Module, stock: bool = True) -> nn.Module:
    view = view_of(model)
    view.prepare()
    if stock:
        slow(model)
    model.requires_grad_(False)
    for site in view.sites():
        if site.role == "embed":
            site.module.register_forward_hook(_wants_gradient)
    return model


def _wants_gradient(module: nn.Module, args: Any, output: Any) -> Any:
    return output.requires_grad_(True)


def _peft_lora(model: nn.Module, autocast: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    from mmtune.tuners.presets import only

    view = view_of(model)
    view.prepare()
    slow(model)
    paths = [site.path for site in view.select(None, EVERY)]
    config = LoraConfig(r=64, lora_alpha=64, target_modules=only(paths))
    return get_peft_model(model, config, autocast_adapter_dtype=autocast)  # type: ignore[arg-type]


def _method(name: str, settings: Mapping[str, Any], model: nn.Module) -> nn.Module:
    from mmtune.tuners.registry import apply, method

    return apply(model, name, method(name).options(**settings))
