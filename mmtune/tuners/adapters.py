"""Adapters on disk: loading with a check that they fit, and folding them into the stock model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.backbones import backbone_of, unwrapped
from mmtune.tuners.sited import AdapterMismatchError

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def load_adapter(
    model: nn.Module,
    path: str | Path,
    trainable: bool = False,
    adapter_name: str = "default",
    **changes: Any,
) -> PeftModel:
    """Put a saved adapter on a stock model.

    Args:
        model: the backbone that the adapter was trained on; its fused attention is split.
        path: folder with adapter_config.json and adapter_model.safetensors.
        trainable: whether its parameters take gradients.
        adapter_name: name in the resulting model.
        **changes: fields of the adapter's config to change; `quantise=False` puts a QLoRA adapter
            on weights that can hold it.

    Raises:
        FileNotFoundError: one of the two files is missing.
        TypeError: the adapter's config has no field that `changes` names.
        AdapterMismatchError: the adapter's tensors do not fit this model; names both shapes.
    """
    from peft import PeftConfig, PeftModel, get_peft_model
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    folder = Path(path)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder} holds no adapter: {file} is missing. A run's is in runs/NAME/adapter."
            )
    backbone_of(model).prepare()
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not trainable
    for key, value in changes.items():
        if not hasattr(config, key):
            raise TypeError(f"the config of this {config.peft_type} adapter has no field {key!r}")
        setattr(config, key, value)
    saved = load_file(folder / WEIGHTS_FILE)
    try:
        wrapped = get_peft_model(model, config, adapter_name=adapter_name)
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        raise AdapterMismatchError(
            f"{folder} was made for another backbone: its target modules are not in this "
            f"{type(model).__name__}. Load it onto the backbone it was trained on."
        ) from error
    assert isinstance(wrapped, PeftModel)
    want = {
        k: v.shape for k, v in get_peft_model_state_dict(wrapped, adapter_name=adapter_name).items()
    }
    have = {k: v.shape for k, v in saved.items()}
    problems = [f"{k}: only in the file, {list(have[k])}" for k in have.keys() - want.keys()]
    problems += [f"{k}: only in the model, {list(want[k])}" for k in want.keys() - have.keys()]
    problems += [
        f"{k}: {list(have[k])} in the file, {list(want[k])} in the model"
        for k in have.keys() & want.keys()
        if have[k] != want[k]
    ]
    if problems:
        wrapped.unload()
        raise AdapterMismatchError(
            f"{folder} does not fit this {type(unwrapped(model)).__name__}; "
            f"{len(problems)} tensors differ:\n  " + "\n  ".join(sorted(problems)[:10])
        )
    set_peft_model_state_dict(wrapped, saved, adapter_name=adapter_name)
    return wrapped


def merge(model: PeftModel) -> nn.Module:
    """Fold the active adapter into the weights and restore the stock layout.

    Returns:
        The stock model; its state dict loads into the stock class.

    Raises:
        ValueError: the method keeps modules of its own that no weight can hold.
    """
    merged = model.merge_and_unload(safe_merge=True)
    backbone_of(merged).restore()
    return merged


def adapter_method(path: str | Path) -> str:
    """The PEFT type that an adapter folder names, such as "AURORA" or "LORA"."""
    return str(json.loads((Path(path) / CONFIG_FILE).read_text())["peft_type"])
