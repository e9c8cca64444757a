"""The training of an editor: steps, validation, early stop, and a resume that is exact."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from editing.meta.checkpoints import State, Trained, best_folder, restore, save
from mmtune.batches import EpochBatches
from mmtune.checkpoints import TrainingError, cut_log
from mmtune.runs import write_folder

if TYPE_CHECKING:
    from torch import Tensor

    from editing.meta.base import TrainedEditor
    from editing.meta.config import MetaTrainingOptions
    from editing.mllm import MLLM
    from editing.requests import EditRecord


@dataclass(frozen=True)
class MetaResult:
    """What a training found.

    Attributes:
        steps: done, those before a resume included.
        best_step: after how many of them the editor was best, and was kept.
        stopped_early: whether patience ended the training.
        validation: the numbers of the best validation: `loss` (the sum), its parts, and `success`
            (share of requests of whose target every token is likeliest after the edit).
        parameters: numbers that were trained.
        seconds: wall time.
    """

    steps: int
    best_step: int
    stopped_early: bool
    validation: Mapping[str, float]
    parameters: int
    seconds: float


def train_editor(
    editor: TrainedEditor,
    mllm: MLLM,
    train: Sequence[EditRecord],
    val: Sequence[EditRecord],
    options: MetaTrainingOptions,
    folder: Path,
    seed: int = 0,
    resume: bool = False,
    progress: bool = True,
) -> MetaResult:
    """Train the editor's network for this model; the best by validation is written.

    A run that was killed and resumed ends with the bits of one that was not (on the CPU, and where
    the device computes the same twice).

    Args:
        editor: what is trained.
        mllm: the model; it stays as it is.
        train: records to learn from.
        val: records that choose.
        options: see `MetaTrainingOptions`.
        folder: receives metrics.jsonl, checkpoints/ and, at the end, trained/.
        seed: see `MetaConfig`.
        resume: go on from the newest checkpoint, or start where there is none.
        progress: draw a progress bar.

    Raises:
        TrainingError: no records, a loss that is not finite or has no gradient, or a checkpoint
            that does not fit.
    """
    devices = [mllm.device] if mllm.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # dropout draws from torch's own generators
        torch.manual_seed(seed)
        training = _Training(editor, mllm, (train, val), options, folder, seed)
        return training.run(resume, progress)


class _Training:
    def __init__(
        self,
        editor: TrainedEditor,
        mllm: MLLM,
        records: tuple[Sequence[EditRecord], Sequence[EditRecord]],
        options: MetaTrainingOptions,
        folder: Path,
        seed: int,
    ) -> None:
        self.editor, self.mllm, self.options, self.seed = editor, mllm, options, seed
        self.train, self.val = records
        if not self.val:
            raise TrainingError("expected records to validate on, got none: set data.val")
        self.metrics, self.checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
        self.folder = folder
        self.order = EpochBatches(len(self.train), options.batch_size, seed, 0, 1, drop_last=False)
        self.batches: list[list[int]] = []
        generator = torch.Generator().manual_seed(seed)
        network = editor.begin(mllm, generator).to(mllm.device)
        optimiser = torch.optim.AdamW(
            editor.groups(network), lr=options.lr, weight_decay=options.weight_decay
        )
        self.trained = Trained(network, optimiser, generator, mllm.device)
        self.state = State()

    def run(self, resume: bool, progress: bool) -> MetaResult:
        self.folder.mkdir(parents=True, exist_ok=True)
        found = restore(self.checkpoints, self.trained) if resume else None
        if found is None:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        self.state = found or self.state
        cut_log(self.metrics, self.state.step)
        before, started = self.state.seconds, time.monotonic()
        with tqdm(
            total=self.options.steps,
            initial=self.state.step,
            desc=f"train {self.editor.name}",
            unit="step",
            disable=not progress,
        ) as bar:
            while not self._done():
                loss = self._step()
                self.state.seconds = before + time.monotonic() - started
                self._after_step()
                bar.update()
                bar.set_postfix(loss=f"{loss:.4f}", best=f"{self.state.best or math.nan:.4f}")
        return self._finish()

    def _done(self) -> bool:
        return self._over() or self._tired()

    def _over(self) -> bool:
        late = 0 < self.options.seconds <= self.state.seconds
        return late or self.state.step >= self.options.steps

    def _tired(self) -> bool:
        return 0 < self.options.patience <= self.state.stale

    def _after_step(self) -> None:
        step, options = self.state.step, self.options
        if step % options.validate_every == 0 or self._over():
            self._validate()
        done = self._done()
        if step % options.log_every == 0 or done:
            means = {name: total / n for name, (total, n) in self.state.sums.items()}
            self.state.sums = {}
            self._write({"step": step, **means})
        if options.save_every and (step % options.save_every == 0 or done):
            save(self.checkpoints, self.trained, self.state)

    def _step(self) -> float:
        self.trained.network.train()
        self.trained.optimiser.zero_grad()
        share, total = 1 / self.options.accumulation, 0.0
        for part in range(self.options.accumulation):
            records = self._records(self.state.step * self.options.accumulation + part)
            losses = self._losses(records, self.trained.generator)
            loss = torch.stack(list(losses.values())).sum() * share
            if not loss.requires_grad:
                raise TrainingError(
                    f"no loss of {records[0].where or records[0].id!r} depends on what is trained: "
                    f"{', '.join(losses)}"
                )
            loss.backward()
            total += float(loss.detach())
            self._count(losses)
        parameters = [p for g in self.trained.optimiser.param_groups for p in g["params"]]
        norm = torch.nn.utils.clip_grad_norm_(
            parameters, self.options.max_grad_norm or math.inf, error_if_nonfinite=False
        )
        if not torch.isfinite(norm):
            raise TrainingError(self._advice(f"the gradient's norm is {float(norm)}"))
        self.trained.optimiser.step()
        self.state.step += 1
        self._add("loss", total)
        self._add("grad_norm", float(norm))
        return total

    def _records(self, number: int) -> list[EditRecord]:
        """The batch of this number, counted from the start of training."""
        epoch, place = divmod(number, len(self.order))
        if place == 0 or not self.batches or self.order.epoch != epoch:
            self.order.set_epoch(epoch)
            self.batches = list(self.order)
        return [self.train[index] for index in self.batches[place]]

    def _losses(
        self, records: Sequence[EditRecord], generator: torch.Generator
    ) -> dict[str, Tensor]:
        losses = self.editor.losses(self.mllm, self.trained.network, records, generator)
        if not losses:
            where = records[0].where or repr(records[0].id)
            raise TrainingError(f"{self.editor.name} has no loss for {where}")
        for name, value in losses.items():
            if not torch.isfinite(value.detach()):
                raise TrainingError(self._advice(f"the loss {name} is {float(value.detach())}"))
        return losses

    def _advice(self, what: str) -> str:
        return (
            f"{what} in step {self.state.step + 1}. Lower training.lr (now {self.options.lr:g}), "
            "or set model.dtype: float32."
        )

    def _add(self, name: str, value: float) -> None:
        total = self.state.sums.setdefault(name, [0.0, 0.0])
        total[0] += value
        total[1] += 1

    def _count(self, losses: Mapping[str, Tensor]) -> None:
        for name, value in losses.items():
            self._add(f"loss_{name}", float(value.detach()))

    def _validate(self) -> None:
        numbers = validate(
            self.editor, self.mllm, self.trained, self.val, self.options.batch_size, self.seed
        )
        self._write({"step": self.state.step, **{f"eval_{k}": v for k, v in numbers.items()}})
        state, loss = self.state, numbers["loss"]
        if not math.isfinite(loss) or (state.best is not None and loss >= state.best):
            state.stale += 1
            return
        last = best_folder(self.checkpoints, state.best_step)
        state.best, state.best_step, state.stale = loss, state.step, 0
        state.validation = numbers
        self.editor.save_trained(
            best_folder(self.checkpoints, state.step),
            self.trained.network,
            self.mllm,
            {"steps": state.step, "validation": numbers},
        )
        if not self.options.save_every:  # else a checkpoint that names it may still be needed
            shutil.rmtree(last, ignore_errors=True)

    def _write(self, line: Mapping[str, float]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _finish(self) -> MetaResult:
        if self.state.best is None:
            raise TrainingError(
                "no validation gave a finite loss, so there is nothing to keep. Lower training.lr."
            )
        best = best_folder(self.checkpoints, self.state.best_step)
        write_folder(
            self.folder / "trained", lambda to: shutil.copytree(best, to, dirs_exist_ok=True)
        )
        return MetaResult(
            steps=self.state.step,
            best_step=self.state.best_step,
            stopped_early=self._tired() and self.state.step < self.options.steps,
            validation=self.state.validation,
            parameters=sum(
                p.numel() for group in self.trained.optimiser.param_groups for p in group["params"]
            ),
            seconds=self.state.seconds,
        )


@torch.no_grad()
def validate(
    editor: TrainedEditor,
    mllm: MLLM,
    trained: Trained,
    records: Sequence[EditRecord],
    batch_size: int,
    seed: int,
) -> dict[str, float]:
    """Mean losses over records, their sum `loss`, and the share of edits that are a `success`.

    What is drawn is the same at every validation.
    """
    generator = torch.Generator().manual_seed(seed)
    trained.network.eval()
    sums: dict[str, list[float]] = {}
    said = 0
    for start in range(0, len(records), batch_size):
        some = records[start : start + batch_size]
        for name, value in editor.losses(mllm, trained.network, some, generator).items():
            total = sums.setdefault(name, [0.0, 0.0])
            total[0] += float(value) * len(some)
            total[1] += len(some)
        said += editor.successes(mllm, trained.network, some, generator)
    means = {name: total / count for name, (total, count) in sums.items()}
    return {"loss": sum(means.values()), **means, "success": said / len(records)}
