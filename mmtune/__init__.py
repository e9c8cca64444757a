"""Parameter-efficient fine-tuning of vision-language models, through PEFT."""

from __future__ import annotations

import importlib
from typing import Any

import wrapt

__version__ = "0.1.0"

_PUBLIC = {
    "AuroraConfig": "mmtune.tuners.aurora",
    "AuroraModel": "mmtune.tuners.aurora",
    "adalora_config": "mmtune.tuners.adalora",
    "backbone_of": "mmtune.backbones",
    "load": "mmtune.backbones",
    "load_adapter": "mmtune.tuners.adapters",
    "lora_config": "mmtune.tuners.presets",
    "merge": "mmtune.tuners.adapters",
    "qlora_config": "mmtune.tuners.qlora",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mmtune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _enter_methods(peft_module: Any) -> None:
    from mmtune.tuners.peft_entry import register

    register(peft_module)


# PEFT takes seconds to import; its tables are filled the moment it is, now if it already was.
wrapt.register_post_import_hook(_enter_methods, "peft")
