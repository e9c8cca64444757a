"""The methods that ship: one file each, found by their `METHOD`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, get_type_hints

from mmtune.suggestions import did_you_mean

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn


@dataclass(frozen=True)
class Method:
    """A fine-tuning method as configs and commands see it.

    Attributes:
        name: the value of `tuner.method` in a config.
        summary: one line for `mmtune list methods`.
        source: paper and identifier.
        options: dataclass whose fields are the other keys below `tuner:`.
        build: (unwrapped model, options) -> PeftConfig aimed at that model; may prepare the model.
    """

    name: str
    summary: str
    source: str
    options: type
    build: Callable[[nn.Module, Any], PeftConfig]


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


@cache
def methods() -> dict[str, Method]:
    """Every method by name, in alphabetical order of module: each tuner module may hold METHODS."""
    import mmtune.tuners

    found: dict[str, Method] = {}
    for info in pkgutil.iter_modules(mmtune.tuners.__path__):
        module = importlib.import_module(f"mmtune.tuners.{info.name}")
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


def apply(model: nn.Module, name: str, options: Any, adapter_name: str = "default") -> PeftModel:
    """Wrap `model` with a fresh adapter of method `name`.

    Args:
        model: a stock model that some backbone describes.
        name: a name from `methods()`.
        options: an instance of that method's `options` dataclass.
    """
    from peft import get_peft_model

    return get_peft_model(model, method(name).build(model, options), adapter_name=adapter_name)
