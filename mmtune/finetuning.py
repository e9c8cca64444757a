"""A whole run, from a config to a folder with adapter, results and report."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune import config as configs
from mmtune.parameters import counts, parameter_groups
from mmtune.runs import Results, RunError, RunFolder, files_named_in, manifest, write_json
from mmtune.tasks.base import first_process

if TYPE_CHECKING:
    from collections.abc import Callable

    from peft import PeftModel

    from mmtune.backbones.base import Loaded
    from mmtune.config import RunConfig
    from mmtune.parameters import ParameterGroup
    from mmtune.tasks.base import Evaluation, Task
    from mmtune.training import TrainingResult

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A loaded model on its device, and the task with its data checked."""

    loaded: Loaded
    task: Task


def load_model(config: RunConfig) -> Loaded:
    """The base model of a config, on the CPU."""
    from mmtune import backbones

    return backbones.load(config.model.name, config.model.dtype)


def prepare(config: RunConfig) -> Prepared:
    """Load the model and the task; the task checks its data before anything is trained."""
    import torch

    from mmtune.device import device_of
    from mmtune.tasks import tasks

    torch.manual_seed(config.seed)
    loaded = load_model(config)
    task = tasks()[config.task](config.task_options, config.data, loaded, config.seed)
    loaded.model.to(device_of(config.training))
    return Prepared(loaded, task)


def wrap(config: RunConfig, loaded: Loaded) -> tuple[PeftModel, list[ParameterGroup]]:
    """Put a fresh adapter on the model, with the task's heads; say what it trains."""
    import torch

    from mmtune.tasks import tasks
    from mmtune.tuners import registry

    torch.manual_seed(config.seed)
    loaded.backbone.prepare()
    sites = loaded.backbone.sites()
    heads = tasks()[config.task].heads(config.task_options, loaded.backbone)
    model = registry.apply(loaded.model, config.method, config.tuner_options, heads=heads)
    return model, parameter_groups(model, sites)


def fine_tune(
    config: RunConfig,
    folder: RunFolder,
    resume: bool = False,
    overwrite: bool = False,
    tell: Callable[[str], None] = log.info,
    split: str = "test",
    before: Evaluation | None = None,
    inspect: Callable[[Task, PeftModel], None] | None = None,
) -> Results:
    """Evaluate, train an adapter, evaluate again; write everything into the run's folder.

    Args:
        config: the run.
        folder: where it is written.
        resume: go on from the newest whole checkpoint in it.
        overwrite: delete a run that is already there.
        tell: receives one line before each stage that takes time.
        split: what is evaluated.
        before: the base model's evaluation of that split, where it is known already.
        inspect: called last with the task and the trained model, which it may use up.

    Raises:
        RunError, TrainingError, and what the task raises about its data.
    """
    from mmtune.device import require_optimizer
    from mmtune.training import train

    first = first_process()
    require_splits(config, split)
    require_optimizer(config.training)
    tell(f"loading {config.model.name} and checking the data")
    ready = prepare(config)
    if first:
        folder.start(configs.to_yaml(config), resume, overwrite)
        write_json(folder.path / "manifest.json", run_manifest(config))
    if before is None:
        tell("evaluating before")
        before = ready.task.evaluate(ready.loaded.model, split, progress=first)
    model, groups = wrap(config, ready.loaded)
    ready.task.before_training(model)
    trainable, total = counts(model)
    tell(f"training {trainable:,} of {total:,} parameters ({len(groups)} groups)")
    trained = train(
        model, ready.task, config.training, folder.path, config.seed, resume, progress=first
    )
    tell("evaluating after")
    after = ready.task.evaluate(model, split, progress=first)
    results = _results(ready.task, (trainable, total), trained, (before, after), split)
    if first:
        folder.save_adapter(model)
        _report(config, folder, ready.task, before, after, results)
        if inspect is not None:
            inspect(ready.task, model)
        folder.save_results(results)
    return results


def _results(
    task: Task,
    sizes: tuple[int, int],
    trained: TrainingResult,
    evaluations: tuple[Evaluation, Evaluation],
    split: str,
) -> Results:
    before, after = evaluations
    # Counted before training: AdaLoRA leaves parameters out on the way.
    trainable, total = sizes
    return Results(
        before=before.metrics,
        after=after.metrics,
        difference=task.compare(before, after),
        trainable=trainable,
        total=total,
        seconds=trained.seconds,
        peak_memory=trained.peak_memory,
        memory_kind=trained.memory_kind,
        steps=trained.steps,
        split=split,
        step_seconds=trained.step_seconds,
        primary=after.primary,
    )


def require_splits(config: RunConfig, split: str = "test") -> None:
    """RunError where the data that a training run needs are not named, before anything is loaded.

    Needed are train and the evaluated `split`, and val where `training.evaluate` is "epoch".
    """
    needed = ["train", split, *(["val"] if config.training.evaluate == "epoch" else [])]
    missing = [
        f"data.{role}" for role in dict.fromkeys(needed) if getattr(config.data, role) is None
    ]
    if missing:
        raise RunError(
            f"{' and '.join(missing)} must be set to train ({config.source}), got nothing. Name a "
            "source, such as data.train: {format: zoo, name: clipart-animals}."
        )


def evaluate(config: RunConfig, adapter: Path | None, split: str) -> Evaluation:
    """Evaluate the base model, or the base model with an adapter, on a split."""
    from mmtune.device import device_of
    from mmtune.tasks import tasks
    from mmtune.tuners.adapters import load_adapter

    needed = tasks()[config.task].reads(config.task_options, split)
    unused = {role: None for role in ("train", "val", "test") if role not in needed}
    ready = prepare(replace(config, data=replace(config.data, **unused)))
    model = ready.loaded.model
    if adapter is not None:
        model = load_adapter(model, adapter).to(device_of(config.training))
    return ready.task.evaluate(model, split, progress=first_process())


def run_manifest(config: RunConfig) -> dict[str, Any]:
    """The manifest of a run of `config` in this process; see `mmtune.runs.manifest`."""
    from mmtune.device import device_of

    name = _device_name(device_of(config.training).type)
    return manifest(config.seed, name, data_files(config), sys.argv)


def data_files(config: RunConfig) -> list[Path]:
    """The files that list a run's data (not each image), for the manifest."""
    from mmtune.data.readers import source_files

    named = files_named_in(config.task_options)
    for role in ("train", "val", "test"):
        source = getattr(config.data, role, None)
        if source is not None:
            named += [Path(path) for path in source_files(source, role)]
    return [path for path in named if path.is_file()]


def _report(
    config: RunConfig,
    folder: RunFolder,
    task: Task,
    before: Evaluation,
    after: Evaluation,
    results: Results,
) -> None:
    from mmtune.report import Report, write_report

    report = Report(
        title=config.name,
        summary=f"{config.method} on {config.model.name}, {config.task}",
        results=results,
        primary=after.primary,
        log=folder.log(),
        gallery=task.gallery(before, after),
        config=folder.config.read_text(encoding="utf-8"),
        manifest=json.loads((folder.path / "manifest.json").read_text(encoding="utf-8")),
    )
    write_report(report, folder.path)


def _device_name(kind: str) -> str:
    import platform

    import torch

    if kind == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
