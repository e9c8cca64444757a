"""Entering this toolkit's methods in PEFT's tables, so that PEFT's own functions know them."""

from __future__ import annotations

from typing import Any


def register(peft_module: Any = None) -> None:
    """Enter every method under its plain name in PEFT's mappings; calling it again changes nothing.

    Called when `peft` is imported (see mmtune/__init__.py). `register_peft_method` refuses names
    that are not in PEFT's enum; plain string keys work for building, saving and loading.
    """
    import peft.mapping as tables

    from mmtune.tuners.registry import modules

    for module in modules():
        for name, (config, tuner) in getattr(module, "PEFT_METHODS", {}).items():
            key: Any = name
            tables.PEFT_TYPE_TO_CONFIG_MAPPING[key] = config
            tables.PEFT_TYPE_TO_TUNER_MAPPING[key] = tuner
            tables.PEFT_TYPE_TO_MIXED_MODEL_MAPPING[key] = tuner
            tables.PEFT_TYPE_TO_PREFIX_MAPPING[key] = tuner.prefix
