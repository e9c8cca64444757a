"""Where weight updates come from: a run, an adapter folder, or a full fine-tune and its base."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.analysis.components import Learned, learned_factors
from mmtune.analysis.deltas import Delta, adapter_deltas, has_deltas, weight_deltas
from mmtune.runs import RunError, RunFolder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel

    from mmtune.backbones.base import Loaded


@dataclass(frozen=True, eq=False)
class Source:
    """Weight updates, and the model that they belong to.

    Attributes:
        title: what they are, in a few words.
        loaded: the base model, prepared, without the updates.
        deltas: in the order of the model, at least one.
        parameters: how many numbers were trained to make them.
        left_out: how many trained numbers are no part of them (biases, norms, gates, heads).
        learned: Aurora's factors.
        files: the weights that they were read from.
    """

    title: str
    loaded: Loaded
    deltas: Sequence[Delta] = field(repr=False)
    parameters: int
    left_out: int
    learned: Sequence[Learned] = field(repr=False)
    files: tuple[Path, ...]


def find(path: Path | None, base: str | None = None, tuned: str | None = None) -> Source:
    """Read the updates that a command names.

    Args:
        path: a run's folder, or an adapter's.
        base: name of the base model; a run's config names its own.
        tuned: a fine-tuned model in place of `path`: its name, or its folder.

    Raises:
        RunError: the arguments name nothing, or what has no weight updates.
        FileNotFoundError: a folder holds neither a run nor an adapter nor a model.
    """
    if (path is None) == (tuned is None):
        raise RunError(
            "name one of the two: a run or adapter folder, or --tuned FOLDER with --base MODEL."
        )
    if path is None:
        if not base or not tuned:
            raise RunError("--tuned needs --base MODEL, the model that it was fine-tuned from.")
        return of_weights(base, tuned)
    folder = RunFolder(path)
    if folder.config.is_file():
        from mmtune.config import load_config

        folder.check_holds_run()
        config = load_config(folder.config)
        return of_adapter(folder.adapter, base or config.model.name, config.name)
    if not (path / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{path} is neither a run (no config.yaml) nor an adapter (no adapter_config.json)."
        )
    if not base:
        raise RunError(f"{path} is an adapter; name the model it belongs to with --base MODEL.")
    return of_adapter(path, base, path.name)


def of_adapter(path: Path, base: str, name: str) -> Source:
    """The updates of an adapter.

    Raises:
        RunError: its method changes no weights, or the base weights' own scale too (DoRA).
        AdapterMismatchError: it belongs to another model.
    """
    from mmtune import backbones
    from mmtune.tuners.adapters import WEIGHTS_FILE, adapter_method, load_adapter

    loaded = backbones.load(base)
    loaded.backbone.prepare()
    sites = loaded.backbone.sites()
    # The base weights of a quantised model have no part in the updates.
    changes: dict[str, Any] = {"quantise": False} if adapter_method(path) == "QLORA" else {}
    model = load_adapter(loaded.model, path, **changes)
    config: Any = model.active_peft_config
    method = str(getattr(config.peft_type, "value", config.peft_type))
    if getattr(config, "use_dora", False):
        raise RunError(
            f"{path} is a DoRA adapter, which rescales the base weights as well; only plain "
            "weight updates can be analysed or compressed."
        )
    if not has_deltas(model):
        raise RunError(
            f"{path} holds {method}, which adds nothing to weights; only methods that do (Aurora, "
            "LoRA, AdaLoRA, QLoRA) can be analysed or compressed."
        )
    deltas = adapter_deltas(model, sites)
    total, left_out = _numbers(path / WEIGHTS_FILE, model, deltas)
    learned = learned_factors(model, deltas)
    model.unload()
    title = f"{name}: {method.lower()} on {base}"
    return Source(title, loaded, deltas, total, left_out, learned, (path / WEIGHTS_FILE,))


def of_weights(base: str, tuned: str) -> Source:
    """The difference between a fine-tuned model and its base.

    Raises:
        RunError: they are of different classes or sizes, or equal.
    """
    from mmtune import backbones

    first, second = backbones.load(base), backbones.load(_model_name(tuned))
    for loaded in (first, second):
        loaded.backbone.prepare()
    sizes = [{k: p.shape for k, p in m.model.named_parameters()} for m in (first, second)]
    if type(first.model) is not type(second.model) or sizes[0] != sizes[1]:
        kinds = [type(m.model).__name__ for m in (first, second)]
        differ = [k for k in {**sizes[0], **sizes[1]} if sizes[0].get(k) != sizes[1].get(k)]
        where = f" and differ in the shape of {len(differ)} tensors" if differ else ""
        raise RunError(
            f"{base} ({kinds[0]}) is not what {tuned} ({kinds[1]}) was fine-tuned from: they must "
            f"be of one class and size{where}."
        )
    deltas = weight_deltas(first.backbone.sites(), second.backbone.sites())
    if not deltas:
        raise RunError(f"no Linear of {tuned} differs from {base}; there is nothing to analyse.")
    inside = {f"{delta.site.path}.weight" for delta in deltas}
    old = dict(first.model.named_parameters())
    changed = [
        p.numel()
        for key, p in second.model.named_parameters()
        if key not in inside and not p.equal(old[key])
    ]
    total = sum(delta.weight.numel() for delta in deltas) + sum(changed)
    files = tuple(sorted(Path(tuned).glob("*.safetensors"))) if Path(tuned).is_dir() else ()
    return Source(f"{tuned} against {base}", first, deltas, total, sum(changed), (), files)


def _model_name(tuned: str) -> str:
    """A folder as the name of the model in it; names stay as they are."""
    folder = Path(tuned)
    if not folder.is_dir():
        return tuned
    for file, scheme in (("open_clip_config.json", "open_clip"), ("config.json", "hf")):
        if (folder / file).is_file():
            return f"{scheme}:{tuned}"
    raise FileNotFoundError(
        f"{folder} holds no model: neither open_clip_config.json nor config.json is there."
    )


def _numbers(file: Path, model: PeftModel, deltas: Sequence[Delta]) -> tuple[int, int]:
    """Trained numbers in an adapter's file, and how many of them have no part in the updates."""
    from safetensors import safe_open

    from mmtune.tuners.aurora.model import FACTORS

    paths = [delta.site.path for delta in deltas] + [FACTORS]
    inside = tuple(f"base_model.model.{path}." for path in paths)
    total = left_out = 0
    with safe_open(file, "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
            count = tensors.get_tensor(key).numel()
            total += count
            if not key.startswith(inside) or ".base_layer." in key:
                left_out += count
    return total, left_out
