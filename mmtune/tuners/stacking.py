"""Several methods on one model: each its own adapter, saved, loaded and switched off by itself.

lora = registry.apply(model, "lora", LoraOptions())
both = stack(lora, PrefixConfig(), "prefix")      # forward passes see both, both can train
save(lora, "runs/a"); save(both, "runs/b")
both = load(load_adapter(model, "runs/a"), "runs/b/prefix", "prefix")
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from mmtune.tuners.adapters import WEIGHTS_FILE
from mmtune.tuners.sited import AdapterMismatchError


def stack(model: PeftModel, config: PeftConfig, name: str) -> PeftModel:
    """Put an adapter of another method on an adapted model.

    Args:
        model: the adapted model; it stays usable, and its adapter stays trainable if it was.
        config: of the adapter to add.
        name: of that adapter, which must be new.

    Returns:
        A second wrapper of the same stock model, which both adapters change. Its own adapter is the
        new one; `save`, `without` act on that alone. `unload` and PEFT's `disable_adapter` act on
        all that is in the model.

    Raises:
        ValueError: the name is taken, or the method is there already.
    """
    base: Any = model.get_base_model()
    taken = {n for layer in _layers(model) for n in layer._all_available_adapter_names()}
    if name in taken:
        raise ValueError(
            f"an adapter {name!r} is in the model already ({', '.join(sorted(taken))}); choose "
            "another name"
        )
    if any(present.peft_type == config.peft_type for present in model.peft_config.values()):
        raise ValueError(
            f"the model has an adapter of {config.peft_type} already; a further one of the same "
            "method is added by model.add_adapter(name, config)"
        )
    # PEFT would take it for an earlier adapter of the same tuner, and mix the two.
    earlier = base.peft_config
    del base.peft_config
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT")
            stacked = get_peft_model(base, config, adapter_name=name)
    except ValueError:
        base.peft_config = earlier
        raise
    assert isinstance(stacked, PeftModel)
    return stacked


def save(model: PeftModel, folder: str | Path) -> None:
    """Save the adapters of one wrapper, without those of the others on the same model.

    As PEFT does, an adapter that is not called "default" goes into a folder of its name in there.
    """
    model.save_pretrained(str(folder), state_dict=_own_state(model))


def load(model: PeftModel, folder: str | Path, name: str) -> PeftModel:
    """Put a saved adapter on an adapted model, frozen; see `stack`.

    Raises:
        AdapterMismatchError: its tensors do not fit this model.
    """
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    stacked = stack(model, config, name)
    saved = load_file(Path(folder) / WEIGHTS_FILE)
    result: Any = set_peft_model_state_dict(stacked, saved, adapter_name=name)
    missing = set(_own_state(stacked)) & set(result.missing_keys)
    wrong = [f"{key}: only in the file" for key in result.unexpected_keys]
    wrong += [f"{key}: only in the model" for key in sorted(missing)]
    if wrong:
        raise AdapterMismatchError(
            f"{folder} does not fit this model; {len(wrong)} tensors differ:\n  "
            + "\n  ".join(wrong[:10])
        )
    return stacked


@contextmanager
def without(model: PeftModel) -> Iterator[None]:
    """Switch off the adapters of one wrapper; those of the others stay."""
    own = [layer for layer in _layers(model) if _names(layer, model)]
    trained = [(p, p.requires_grad) for p in model.parameters()]
    for layer in own:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in own:
            layer.enable_adapters(True)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def _layers(model: PeftModel) -> list[BaseTunerLayer]:
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer)]


def _names(layer: BaseTunerLayer, model: PeftModel) -> set[str]:
    """The adapters of this wrapper that sit on a layer."""
    return set(layer._all_available_adapter_names()) & set(model.peft_config)


def _own_state(model: PeftModel) -> dict[str, Tensor]:
    """The tensors of this wrapper's adapters, under their names in the model."""
    prefixes = tuple(
        f"{path}.{group}.{name}"
        for path, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
        for group in layer.adapter_layer_names
        for name in _names(layer, model)
    )
    return {
        key: value
        for key, value in model.state_dict().items()
        if any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
    }
