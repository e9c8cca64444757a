"""Parameter-efficient fine-tuning of vision-language models, through PEFT."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import wrapt

__version__ = "0.1.0"

_PUBLIC = {
    "AdapterConfig": "mmtune.tuners.bottleneck",
    "AdapterDropConfig": "mmtune.tuners.drop",
    "AdapterFusionConfig": "mmtune.tuners.fusion",
    "AuroraConfig": "mmtune.tuners.aurora",
    "AuroraModel": "mmtune.tuners.aurora",
    "BitFitConfig": "mmtune.tuners.bitfit",
    "MamConfig": "mmtune.tuners.mam",
    "PTuningConfig": "mmtune.tuners.ptuning",
    "PTuningV2Config": "mmtune.tuners.ptuning_v2",
    "PrefixConfig": "mmtune.tuners.prefix",
    "PromptConfig": "mmtune.tuners.prompt",
    "UniPELTConfig": "mmtune.tuners.unipelt",
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


# transformers and PEFT import bitsandbytes where it is installed, which then tells of every fast
# kernel that this machine lacks, whatever is asked for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# PEFT takes seconds to import; its tables are filled the moment it is, now if it already was.
wrapt.register_post_import_hook(_enter_methods, "peft")
