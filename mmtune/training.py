"""The transformers Trainer, told about tasks and tuners; checkpoints that survive being killed."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from mmtune.batches import EpochBatches
from mmtune.checkpoints import (
    STATE,
    TrainingError,
    checkpoints,
    cut_log,
    load_hooks,
    load_weights,
    save_hooks,
    save_weights,
    sync,
)
from mmtune.config import TrainingOptions
from mmtune.device import Fetched, PeakMemory, checkpoint_activations
from mmtune.flow import Flow
from mmtune.passes import Passes
from mmtune.step_times import StepTimes
from mmtune.trainer_arguments import trainer_arguments
from mmtune.tuners.hooks import JoinedHooks, TrainingHooks
from mmtune.tuners.registry import hooks_for

if TYPE_CHECKING:
    from peft import PeftModel

    from mmtune.tasks.base import Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """What a training run leaves beside the weights.

    Attributes:
        steps: optimiser steps in all, those before a resume included.
        seconds: wall time of training, that before a resume included.
        peak_memory: bytes; `memory_kind` says of what.
        best_step: the step whose weights the model ends with, where `keep` is "best".
        step_seconds: the median step of this process, without waiting for data.
    """

    steps: int
    seconds: float
    peak_memory: int
    memory_kind: str
    best_step: int | None = None
    step_seconds: float | None = None


class TaskTrainer(Trainer):
    """A Trainer whose loss and evaluation come from a `Task`, and whose checkpoints are atomic.

    A checkpoint holds the adapter, optimiser, scheduler, random states and counters, never the
    base. It is written under a name that resuming ignores and renamed when whole.
    """

    def __init__(
        self,
        model: PeftModel,
        task: Task,
        options: TrainingOptions,
        arguments: TrainingArguments,
        metrics: Path,
        progress: bool,
    ) -> None:
        self.task, self.options, self.metrics_file = task, options, metrics
        self.adapted = model
        self.hooks = TrainingHooks()
        self.progress = progress
        self.sums: dict[str, list[float]] = {}
        self.resumed: dict[str, Any] = {}
        self.passes: Passes | None = None
        self.started = time.monotonic()
        self.batches = EpochBatches(
            len(task.train_dataset),  # type: ignore[arg-type]
            options.batch_size,
            arguments.seed,
            arguments.process_index,
            arguments.world_size,
            options.drop_last,
        )
        self.steps_per_epoch = math.ceil(len(self.batches) / options.accumulation)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=task.train_dataset,
            eval_dataset=task.train_dataset if options.evaluate == "epoch" else None,
            data_collator=task.collate,
        )
        # The task's loss is the mean over its micro-batch: the Trainer divides by their number.
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.flow = Flow(self, progress)
        self.add_callback(self.flow)

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this process, on the CPU; skipping ahead decodes nothing."""
        dataset: Dataset = self.task.train_dataset
        return DataLoader(
            dataset,
            batch_sampler=self.batches,
            collate_fn=self.task.collate,
            num_workers=self.options.workers,
            pin_memory=self.args.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.args.seed),
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task's loss and the method's penalty."""
        loss, numbers = self._loss(model, inputs)
        self.fetched = ("loss", *numbers), Fetched(loss, numbers.values())
        return (loss, None) if return_outputs else loss

    def _loss(
        self, model: nn.Module, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        loss, numbers = self.task.loss(model, inputs)
        penalty = self.hooks.penalty()
        if penalty is None:
            return loss, dict(numbers)
        return loss + penalty, {**numbers, "penalty": penalty.detach()}

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forward and backward; TrainingError where the loss is not finite, before any update."""
        if self.options.cuda_graphs:
            step, numbers = self._pass(model, inputs)
        else:
            step = super().training_step(model, inputs, num_items_in_batch)
            names, fetched = self.fetched  # looked at now, while the device is busy with backward
            numbers = dict(zip(names, fetched.values(), strict=True))
        loss = numbers.pop("loss")
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} in step {self.state.global_step + 1}. Lower "
                f"training.lr (now {self.options.lr:g}), raise training.warmup, or set "
                "training.precision: float32."
            )
        for name, value in numbers.items():
            total = self.sums.setdefault(name, [0.0, 0.0])
            total[0] += value
            total[1] += 1
        return step

    def _pass(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """What the Trainer does in a step, replayed where it can be."""
        if self.passes is None:
            self.passes = Passes(
                partial(self._scaled_loss, model),
                self.accelerator.backward,
                [p for p in model.parameters() if p.requires_grad],
                self.args.device,
                accumulates=self.options.accumulation > 1,
                replays=self._replays(),
            )
        model.train()
        return self.passes(self._prepare_inputs(inputs), self.current_gradient_accumulation_steps)

    def _scaled_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], passes: int
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        with self.compute_loss_context_manager():
            loss, numbers = self._loss(model, inputs)
        return loss / passes, numbers

    def _replays(self) -> bool:
        reasons = {
            "on the CPU": self.args.device.type != "cuda",
            "with several processes": self.args.world_size > 1,
            "with gradient_checkpointing": self.options.gradient_checkpointing,
            "with a task or method that changes from step to step": not self.hooks.replayable,
        }
        found = [reason for reason, holds in reasons.items() if holds]
        if found:
            log.info("training.cuda_graphs has no effect %s", ", ".join(found))
        return not found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Also write one line of metrics.jsonl per logged training step."""
        if "loss" in logs:
            means = {name: total / count for name, (total, count) in self.sums.items()}
            self.sums.clear()
            self._write_line({**logs, **means})
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The task's evaluation of the val split, as `eval_…` numbers."""
        found = self.task.evaluate(self.adapted, "val", self.progress and self.args.should_save)
        numbers = {f"eval_{name}": metric.value for name, metric in found.metrics.items()}
        self._write_line(numbers)
        self.log(numbers)
        numbers["eval_primary"] = found.metrics[found.primary].value
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, numbers
        )
        return numbers

    def _write_line(self, numbers: dict[str, float]) -> None:
        if self.args.should_save:
            epoch = round(self.state.epoch or 0, 4)
            line = {"step": self.state.global_step, "epoch": epoch, **numbers}
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def seconds(self) -> float:
        """Wall time of training so far, that before a resume included."""
        return self.resumed.get("seconds", 0.0) + time.monotonic() - self.started

    def restore_sums(self) -> None:
        """After a resume: the running sums that the next logged line is a mean of."""
        if self.resumed:
            self._tr_loss = torch.tensor(self.resumed["loss_sum"], device=self.args.device)
            self._globalstep_last_logged = self.resumed["last_logged"]
            self._total_loss_scalar = self.resumed["loss_total"]
            self.sums = {name: list(total) for name, total in self.resumed["sums"].items()}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        final = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        partial = final.with_name(f".partial-{final.name}")
        self.store_flos()
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._save(str(partial))
        self._save_optimizer_and_scheduler(str(partial))
        self._save_scaler(str(partial))
        self._save_rng_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(partial / "trainer_state.json"))
            (partial / STATE).write_text(json.dumps(self._sums_to_resume()), encoding="utf-8")
            sync(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            self._drop_old_checkpoints(final)
        self.accelerator.wait_for_everyone()

    def _sums_to_resume(self) -> dict[str, Any]:
        return {
            "loss_sum": self._tr_loss.item(),
            "loss_total": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "sums": self.sums,
            "seconds": self.seconds(),
            "batch_size": self.options.batch_size * self.args.world_size,
        }

    def _drop_old_checkpoints(self, newest: Path) -> None:
        found = checkpoints(newest.parent)
        best = newest.with_name(f"checkpoint-{self.state.best_global_step}")
        for path in found[: -self.options.checkpoints]:
            if path != best:
                shutil.rmtree(path, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        save_weights(self.adapted, Path(str(output_dir)))
        save_hooks(self.hooks, Path(str(output_dir)))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_weights(self.adapted, Path(resume_from_checkpoint))
        load_hooks(self.hooks, Path(resume_from_checkpoint))


def hooks_of(model: PeftModel, task: Task, steps: int, seed: int) -> TrainingHooks:
    """What the method and the task do around the steps of a run of so many."""
    method = hooks_for(model, steps, seed)
    return JoinedHooks({"method": method, "task": task.hooks(model, steps)})


def train(
    model: PeftModel,
    task: Task,
    options: TrainingOptions,
    folder: Path,
    seed: int = 0,
    resume: bool = False,
    progress: bool = True,
) -> TrainingResult:
    """Train the adapter of `model` on the task's training split.

    Args:
        model: a PeftModel; it is moved to the training device and trained in place.
        task: the objective, with its data.
        options: see `TrainingOptions`.
        folder: receives metrics.jsonl and checkpoints/.
        seed: of data order and dropout.
        resume: go on from the newest whole checkpoint, or start where there is none.
        progress: draw a progress bar on the first process.

    Raises:
        TrainingError: nothing to train, data smaller than a batch, or a loss that is not finite.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise TrainingError(
            "the model has no trainable parameter. Check that tuner.branches and tuner.sites "
            "choose something, and that the adapter was loaded with trainable=True."
        )
    arguments = trainer_arguments(options, folder / "checkpoints", seed)
    if options.gradient_checkpointing:
        checkpoint_activations(model)
    metrics = folder / "metrics.jsonl"
    trainer = TaskTrainer(model, task, options, arguments, metrics, progress)
    steps = math.ceil(options.epochs * trainer.steps_per_epoch)
    arguments.max_steps = min(steps, options.max_steps or steps)
    trainer.hooks = hooks_of(model, task, arguments.max_steps, seed)
    found = checkpoints(folder / "checkpoints") if resume else []
    done = _start(trainer, found[-1] if found else None, metrics)
    memory, times = PeakMemory(arguments.device), StepTimes(arguments.device)
    trainer.add_callback(times)
    try:
        if done < arguments.max_steps:
            trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    finally:
        trainer.flow.close()
        trainer.passes = None  # recordings hold memory that evaluation can use
        # Undo the autocast wrapping of forward, so that evaluation sees the model as it was.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    best = _restore_best(trainer) if options.keep == "best" else None
    trainer.hooks.finish()
    peak, kind = memory.peak()
    steps = max(done, trainer.state.global_step)
    return TrainingResult(steps, trainer.seconds(), peak, kind, best, times.median())


def _start(trainer: TaskTrainer, checkpoint: Path | None, metrics: Path) -> int:
    """Clear or cut metrics.jsonl; read what a checkpoint says. Returns the steps already done."""
    if checkpoint is None:
        if trainer.args.should_save:
            metrics.unlink(missing_ok=True)
        return 0
    trainer.resumed = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    together = trainer.options.batch_size * trainer.args.world_size
    if trainer.resumed["batch_size"] != together:
        raise TrainingError(
            f"{checkpoint} was trained with {trainer.resumed['batch_size']} samples a step on all "
            f"processes together, now it is {together}; the data order would differ. Resume with "
            "the same batch size times processes."
        )
    trainer.state = type(trainer.state).load_from_json(str(checkpoint / "trainer_state.json"))
    step = trainer.state.global_step
    if trainer.args.should_save:
        cut_log(metrics, step)
    log.info("resuming from %s", checkpoint)
    if step >= trainer.args.max_steps:
        trainer._load_from_checkpoint(str(checkpoint))
    return step


def _restore_best(trainer: TaskTrainer) -> int | None:
    step = trainer.state.best_global_step
    if step is None:
        return None
    trainer.accelerator.wait_for_everyone()
    trainer._load_from_checkpoint(f"{trainer.args.output_dir}/checkpoint-{step}")
    return step
