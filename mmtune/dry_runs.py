"""What a run would train and need, found out without training it.

The model is built at its full size: with its weights where they are at hand, and otherwise on the
meta device. The run's own data is read and checked where all of it is here. The estimate of memory
is of made-up data.
"""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmtune.rehearsal import DATA, listed, memory_of, stand_in

if TYPE_CHECKING:
    from peft import PeftModel

    from mmtune.backbones.base import Loaded
    from mmtune.config import RunConfig
    from mmtune.data.options import SourceOptions
    from mmtune.memory import MemoryEstimate
    from mmtune.parameters import ParameterGroup

State = Literal["here", "fetched", "missing"]


@dataclass(frozen=True)
class Need:
    """One thing that a run needs.

    Attributes:
        key: the config key that names it.
        what: the file, folder or repository.
        state: "here"; "fetched": a run downloads it; "missing": no run can start without it.
        text: how to get it.
    """

    key: str
    what: str
    state: State
    text: str = ""


@dataclass(frozen=True)
class DryRun:
    """What a dry run found.

    Attributes:
        needs: everything that the config names outside itself.
        model: with a fresh adapter; its parameters may be on the meta device.
        groups: what would be trained.
        memory: of a training step, or a sentence about why it is not known.
        samples: of the training split, where the data is complete.
        meta: whether the model was built without its weights.
    """

    needs: list[Need]
    model: PeftModel
    groups: list[ParameterGroup]
    memory: MemoryEstimate | str
    samples: int | None
    meta: bool

    @property
    def missing(self) -> list[Need]:
        """What must be there before a run can start."""
        return [need for need in self.needs if need.state == "missing"]


def dry_run(config: RunConfig) -> DryRun:
    """Build the model and adapter, look for the data, count parameters and memory.

    Raises:
        RunError: the config names no data to train on.
        ValueError, OSError: the model or adapter cannot be built; or data that is there is bad.
    """
    from mmtune.finetuning import load_model, require_splits, wrap
    from mmtune.tasks import tasks

    require_splits(config)
    model_need = _model(config.model.name)
    data_needs = [*_data(config), *_task_files(config)]
    complete = all(need.state == "here" for need in data_needs)
    meta = model_need.state != "here"
    loaded = _shell(config) if meta else load_model(config)
    samples = None
    if complete:
        task = tasks()[config.task](config.task_options, config.data, loaded, config.seed)
        samples = len(task.train_dataset)  # type: ignore[arg-type]
    model, groups = wrap(config, loaded)
    needs = without_repeats([model_need, *data_needs])
    return DryRun(needs, model, groups, _memory(config), samples, meta)


def _shell(config: RunConfig) -> Loaded:
    from mmtune.backbones.loading import shell

    try:
        return shell(config.model.name, config.model.dtype)
    except OSError as error:
        raise ValueError(
            f"model.name: {config.model.name} is not on this machine and its sizes are not known "
            f"without it: {error}"
        ) from None


def _memory(config: RunConfig) -> MemoryEstimate | str:
    """Of the same step on made-up data."""
    if config.task not in DATA:
        return f"not counted: there is no made-up data for the task {config.task!r}"
    with tempfile.TemporaryDirectory(prefix="mmtune-dry-run-") as folder:
        return memory_of(stand_in(config, Path(folder), config.training.batch_size))


def _model(name: str) -> Need:
    scheme, _, rest = name.partition(":")
    key, source = "model.name", rest.removeprefix("random:")
    if scheme == "open_clip" and not Path(rest).is_dir():
        architecture, _, tag = rest.partition("/")
        if tag and not _open_clip_cached(architecture, tag):
            return Need(key, name, "fetched", "the weights are not in the cache")
    elif scheme == "hf" and not Path(source).is_dir():
        if source.startswith((".", "/")):
            text = "no such folder; `mmtune convert blip FILE --kind KIND --out FOLDER` makes one"
            return Need(key, source, "missing", text)
        if not _hub_cached(source):
            return Need(key, name, "fetched", "the repository is not in the cache")
    return Need(key, name, "here")


def _open_clip_cached(architecture: str, tag: str) -> bool:
    from open_clip import get_pretrained_cfg

    settings = get_pretrained_cfg(architecture, tag)
    repository, _, file = str(settings.get("hf_hub") or "").rpartition("/")
    if repository and (_hub_cached(repository) or (file and _hub_cached(f"{repository}/{file}"))):
        return True
    kept = Path("~/.cache/clip").expanduser() / Path(str(settings.get("url") or "none")).name
    return kept.is_file()


def _hub_cached(repository: str) -> bool:
    """Whether some weights of a repository are in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    files = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")
    indices = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
    return any(
        isinstance(try_to_load_from_cache(repository, file), str) for file in (*files, *indices)
    )


def _data(config: RunConfig) -> Iterator[Need]:
    for role in ("train", "val", "test"):
        source: SourceOptions | None = getattr(config.data, role)
        if source is not None:
            yield from _source(f"data.{role}", source)


def _source(key: str, source: SourceOptions) -> Iterator[Need]:
    from mmtune.data.readers import expand_braces

    if source.format in ("zoo", "synthetic"):
        yield Need(key, f"{source.format}:{source.name}", "here")
        return
    named = [(f"{key}.path", p) for p in expand_braces(str(source.path))]
    named += [(f"{key}.{n}", v) for n in ("images", "answers") if (v := getattr(source, n))]
    for name, path in named:
        if Path(path).exists() or glob.glob(path):
            yield Need(name, path, "here")
        elif source.format == "datasets" and name.endswith("path"):
            yield Need(name, path, "fetched", "no folder of that name: a repository of the hub")
        else:
            text = f"{source.format}: no such file or folder; put it there, or set {name}"
            yield Need(name, path, "missing", text)


def _task_files(config: RunConfig) -> Iterator[Need]:
    """Files of lists that task options name."""
    for name, path in listed(config.task_options).items():
        key = f"task.{name}"
        if Path(path).is_file():
            yield Need(key, path, "here")
        else:
            yield Need(key, path, "missing", f"no such file; put it there, or set {key}")


def without_repeats(needs: list[Need]) -> list[Need]:
    """Needs of the same thing as one, whose key names the first and how many more."""
    found: dict[tuple[str, State], list[Need]] = {}
    for need in needs:
        found.setdefault((need.what, need.state), []).append(need)
    return [
        replace(same[0], key=same[0].key + (f" and {len(same) - 1} more" if len(same) > 1 else ""))
        for same in found.values()
    ]
