"""The methods that ship: one file each, found by their `METHOD`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, make_dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_type_hints

from mmtune.suggestions import did_you_mean

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn

    from mmtune.tuners.hooks import TrainingHooks


@dataclass(frozen=True)
class Method:
    """A fine-tuning method as configs and commands see it.

    Attributes:
        name: the value of `tuner.method` in a config.
        summary: one line for `mmtune list methods`.
        source: paper and identifier.
        options: dataclass whose fields are the other keys below `tuner:`.
        build: (unwrapped model, options) -> PeftConfig aimed at that model; may prepare the model.
        hooks: (model, optimiser steps of the run, its seed) -> what happens around these steps. The
            PEFT type of a method with hooks is its name in capitals.
    """

    name: str
    summary: str
    source: str
    options: type
    build: Callable[[nn.Module, Any], PeftConfig]
    hooks: Callable[[PeftModel, int, int], TrainingHooks] | None = None


def options_of(config: type, leave_out: Collection[str] = ()) -> type:
    """The dataclass of the settings that a PeftConfig class adds to PEFT's own.

    Args:
        config: a PeftConfig dataclass.
        leave_out: further fields that no run config sets.
    """
    from peft import PeftConfig

    hidden = {f.name for f in fields(PeftConfig)} | {
        *leave_out,
        "target_modules",
        "modules_to_save",
    }
    types = get_type_hints(config)
    chosen = []
    for f in fields(config):
        if f.name in hidden:
            continue
        if f.default_factory is not MISSING:
            spec = field(default_factory=f.default_factory)
        else:
            spec = field(default=f.default)
        chosen.append((f.name, types[f.name], spec))
    return make_dataclass(config.__name__.replace("Config", "Options"), chosen)


def config_of(config: Callable[..., PeftConfig]) -> Callable[[nn.Module, Any], PeftConfig]:
    """The `Method.build` of a config whose fields are the options; the tuner aims it."""
    return lambda model, options: config(**asdict(options))


def modules() -> list[ModuleType]:
    """The tuner modules in alphabetical order: each may hold METHODS and PEFT_METHODS."""
    # PEFT's import asks for them while the package itself may still be importing.
    package = importlib.import_module("mmtune.tuners")
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    return [importlib.import_module(f"mmtune.tuners.{name}") for name in names]


@cache
def methods() -> dict[str, Method]:
    """Every method by name, in alphabetical order of module."""
    found: dict[str, Method] = {}
    for module in modules():
        for method in getattr(module, "METHODS", ()):
            found[method.name] = method
    return found


def method(name: str) -> Method:
    """The method called `name`. Raises ValueError that lists the methods there are."""
    known = methods()
    if name not in known:
        hint = did_you_mean(name, known)
        raise ValueError(f"no method {name!r}; there are {', '.join(known)}.{hint}")
    return known[name]


def apply(
    model: nn.Module,
    name: str,
    options: Any,
    adapter_name: str = "default",
    heads: Sequence[str] = (),
) -> PeftModel:
    """Wrap `model` with a fresh adapter of method `name`.

    Args:
        model: a stock model that some backbone describes.
        name: a name from `methods()`.
        options: an instance of that method's `options` dataclass.
        adapter_name: what PEFT calls it.
        heads: paths of modules that train whole, as copies that the adapter's file holds.
    """
    from peft import get_peft_model

    config: Any = method(name).build(model, options)
    if heads:
        config.modules_to_save = list(heads)
    return get_peft_model(model, config, adapter_name=adapter_name)


def hooks_for(model: PeftModel, total_steps: int, seed: int) -> TrainingHooks:
    """The hooks of the method whose adapter is active in `model`, for a run of so many steps."""
    from mmtune.tuners.hooks import TrainingHooks

    config: Any = model.active_peft_config
    found = methods().get(config.peft_type.lower())
    if found is None or found.hooks is None:
        return TrainingHooks()
    return found.hooks(model, total_steps, seed)
