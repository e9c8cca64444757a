"""A config's training at its full size, on made-up data and without trained weights.

What a rehearsal measures is real: step time, samples a second, memory. What it learns means
nothing. `stand_in` makes the config that it trains; `mmtune train --dry-run` uses the same.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.data.options import DataOptions, SourceOptions
from mmtune.runs import write_json

if TYPE_CHECKING:
    from mmtune.config import RunConfig
    from mmtune.memory import MemoryEstimate

# What each task trains on, in the words of the synthetic reader.
DATA = {
    "retrieval": "captions",
    "blip_retrieval": "captions",
    "captioning": "captions",
    "vqa": "questions",
    "video_retrieval": "video_captions",
    "blip_video_retrieval": "video_captions",
    "video_qa": "video_questions",
}
MOST = 1024  # made-up records; a longer rehearsal goes through them again
LISTS = (".json", ".jsonl", ".txt", ".csv")  # endings of files that task options name


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal measured, beside what was expected.

    Attributes:
        name: of the config.
        model: the architecture, and `method` and `task` what was done with it.
        steps: optimiser steps.
        batch: samples of one optimiser step.
        step_seconds: the median step, without waiting for data; `samples_per_second` follows.
        seconds: of all steps, waiting for data included.
        trainable, total: parameters.
        peak_memory: bytes, of what `memory_kind` says.
        estimate: bytes expected, and why there are none where they could not be counted.
        first_loss, last_loss: of the first and the last step.
        manifest: device, versions, commit, command.
    """

    name: str
    model: str
    method: str
    task: str
    steps: int
    batch: int
    step_seconds: float
    samples_per_second: float
    seconds: float
    trainable: int
    total: int
    peak_memory: int
    memory_kind: str
    estimate: int | str
    first_loss: float
    last_loss: float
    manifest: dict[str, Any]


def stand_in(config: RunConfig, folder: Path, count: int) -> RunConfig:
    """The config with random weights of the same size, and `count` made-up training records alone.

    Args:
        config: the real one.
        folder: where made-up videos and lists are written.
        count: training records.

    Raises:
        ValueError: a task whose data is not known here.
    """
    from mmtune.backbones.loading import untrained

    if config.task not in DATA:
        raise ValueError(
            f"there is no made-up data for the task {config.task!r}; there is for {', '.join(DATA)}"
        )
    train = SourceOptions("synthetic", str(folder / "films"), name=DATA[config.task], limit=count)
    return replace(
        config,
        model=replace(config.model, name=untrained(config.model.name)),
        data=DataOptions(train=train),
        task_options=_with_lists(config.task_options, folder),
    )


def _with_lists(options: Any, folder: Path) -> Any:
    """Task options whose answer lists are made up too."""
    from mmtune.data.readers.synthetic import ANSWERS

    lists = {name: str(folder / f"{name}.json") for name in listed(options)}
    for path in lists.values():
        write_json(Path(path), ANSWERS)
    return replace(options, **lists) if lists else options


def listed(options: Any) -> dict[str, str]:
    """Task options that name the file of a list, such as that of answers: option -> file."""
    names = [field.name for field in fields(options)] if is_dataclass(options) else []
    named = {name: getattr(options, name) for name in names}
    return {k: v for k, v in named.items() if isinstance(v, str) and v.endswith(LISTS)}


def rehearse(
    config: RunConfig, steps: int, record: Path, tell: Callable[[str], None] = lambda _: None
) -> Rehearsal:
    """Train `steps` steps on made-up data and measure them.

    Args:
        config: the run; batch size, precision, optimiser and the rest are followed, but nothing is
            evaluated or kept.
        steps: optimiser steps.
        record: the file of JSON lines that the result is added to.
        tell: receives one line before each stage that takes time.

    Raises:
        ValueError: a task or architecture that is not known here; fewer than 1 step; more than one
            process.
        TrainingError: see `mmtune.training.train`.
    """
    from mmtune.finetuning import prepare, run_manifest, wrap
    from mmtune.parameters import counts
    from mmtune.training import train

    if steps < 1:
        raise ValueError(f"--steps must be at least 1, got {steps}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise ValueError(
            f"a rehearsal measures one process, but {processes} were started; start it by itself, "
            "without torchrun or accelerate launch."
        )
    training = config.training
    batch = training.batch_size * training.accumulation
    short = replace(
        training,
        epochs=float(steps),
        max_steps=steps,
        evaluate="none",
        keep="last",
        log_every=1,
        save_every=0,
        report_to="none",
    )
    with tempfile.TemporaryDirectory(prefix="mmtune-rehearsal-") as name:
        folder = Path(name)
        count = max(batch, min(batch * steps, MOST))
        made = replace(stand_in(config, folder, count), training=short)
        tell(f"counting the memory of {made.model.name}")
        expected = memory_of(made)
        tell(f"building {made.model.name} and {count} samples")
        ready = prepare(made)
        model, _ = wrap(made, ready.loaded)
        ready.task.before_training(model)
        trainable, total = counts(model)
        tell(f"training {trainable:,} of {total:,} parameters for {steps} steps")
        done = train(model, ready.task, short, folder, made.seed)
        losses = _losses(folder / "metrics.jsonl")
    median = done.step_seconds or 0.0
    found = Rehearsal(
        name=config.name,
        model=made.model.name,
        method=config.method,
        task=config.task,
        steps=done.steps,
        batch=batch,
        step_seconds=median,
        samples_per_second=batch / median if median else 0.0,
        seconds=done.seconds,
        trainable=trainable,
        total=total,
        peak_memory=done.peak_memory,
        memory_kind=done.memory_kind,
        estimate=expected if isinstance(expected, str) else expected.total,
        first_loss=losses[0],
        last_loss=losses[-1],
        manifest=run_manifest(made),
    )
    record.parent.mkdir(parents=True, exist_ok=True)
    with record.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"at": datetime.now(UTC).isoformat("T", "seconds"), **asdict(found)}))
        file.write("\n")
    return found


def memory_of(config: RunConfig) -> MemoryEstimate | str:
    """Count one step of a config made by `stand_in`; a sentence where that cannot be done."""
    from mmtune.backbones.loading import shell
    from mmtune.finetuning import wrap
    from mmtune.memory import estimate_memory
    from mmtune.tasks import tasks

    loaded = shell(config.model.name, config.model.dtype)
    task = tasks()[config.task](config.task_options, config.data, loaded, config.seed)
    model, _ = wrap(config, loaded)
    samples = [task.train_dataset[i] for i in range(config.training.batch_size)]
    try:
        return estimate_memory(model, task, config.training, task.collate(samples), config.seed)
    except RuntimeError as error:
        return f"not counted: {type(error).__name__}: {error}"


def _losses(metrics: Path) -> list[float]:
    lines = metrics.read_text(encoding="utf-8").splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]
