"""Training checkpoints: written whole or not at all, found again by step."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

    from mmtune.tuners.hooks import TrainingHooks

log = logging.getLogger(__name__)
STATE = "mmtune_state.json"
EXTRA = "trained_base.safetensors"
HOOKS = "hooks.safetensors"


class TrainingError(RuntimeError):
    """Training that cannot start or go on; the message says how to mend it."""


def save_weights(model: PeftModel, folder: Path) -> None:
    """Write the adapter in PEFT's format, and beside it what else is trained (a temperature)."""
    from safetensors.torch import save_file

    model.save_pretrained(str(folder), save_embedding_layers=False)
    extra = _trained_base(model)
    if extra:
        save_file({name: p.detach().contiguous() for name, p in extra.items()}, folder / EXTRA)


def load_weights(model: PeftModel, folder: Path) -> None:
    """Put what `save_weights` wrote into the model, every tensor of it.

    Raises:
        TrainingError: a tensor is missing, too many, or has another shape.
    """
    import torch
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    state = load_file(folder / "adapter_model.safetensors")
    name = model.active_adapters[0]
    have = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    _require_same(have, state, folder)
    extra = _trained_base(model)
    saved = load_file(folder / EXTRA) if (folder / EXTRA).exists() else {}
    _require_same(extra, saved, folder)
    set_peft_model_state_dict(model, state, adapter_name=name)
    with torch.no_grad():
        for key, value in saved.items():
            extra[key].copy_(value)


def save_hooks(hooks: TrainingHooks, folder: Path) -> None:
    """Write what method and task remember beside the parameters, if they do."""
    from safetensors.torch import save_file

    state = hooks.state_dict()
    if state:
        save_file({name: t.contiguous() for name, t in state.items()}, folder / HOOKS)


def load_hooks(hooks: TrainingHooks, folder: Path) -> None:
    """Give method and task back what `save_hooks` wrote."""
    from safetensors.torch import load_file

    if (folder / HOOKS).exists():
        hooks.load_state_dict(load_file(folder / HOOKS))


def _trained_base(model: PeftModel) -> dict[str, nn.Parameter]:
    """Trainable parameters that PEFT does not count to the adapter."""
    from peft import get_peft_model_state_dict

    name = model.active_adapters[0]
    adapter = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    places = {tensor.data_ptr() for tensor in adapter.values()}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.data_ptr() not in places
    }


def _require_same(have: Mapping[str, Tensor], state: Mapping[str, Tensor], folder: Path) -> None:
    wrong = [
        f"{key}: model {tuple(have[key].shape) if key in have else 'none'}, "
        f"file {tuple(state[key].shape) if key in state else 'none'}"
        for key in sorted(have.keys() | state.keys())
        if key not in have or key not in state or have[key].shape != state[key].shape
    ]
    if wrong:
        raise TrainingError(f"{folder} does not fit the adapter: {'; '.join(wrong[:5])}")


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in `folder`, by step; a half-written one has another name."""
    found = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.rpartition("-")[2]
        if number.isdigit():
            whole = all((path / name).is_file() for name in ("trainer_state.json", STATE))
            if whole:
                found.append((int(number), path))
            else:
                log.warning("%s is not a whole checkpoint and is ignored", path)
    return [path for _, path in sorted(found)]


def sync(folder: Path) -> None:
    """Ask the operating system to put every file of `folder` on disk."""
    for path in (p for p in folder.rglob("*") if p.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def cut_log(metrics: Path, step: int) -> None:
    """Leave in metrics.jsonl what was written up to a step: a resume writes the rest again."""
    if not metrics.exists():
        return
    kept = [
        line
        for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        if line.endswith("\n") and json.loads(line)["step"] <= step
    ]
    partial = metrics.with_name(f".{metrics.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(metrics)
