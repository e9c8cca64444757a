"""Where a training run is: what follows from it, and the bar that shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

if TYPE_CHECKING:
    from mmtune.training import TaskTrainer


class Flow(TrainerCallback):
    """Tells task, sampler and method where the run is; draws the bar; chooses when to save."""

    def __init__(self, trainer: TaskTrainer, progress: bool) -> None:
        self.trainer, self.progress = trainer, progress
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.restore_sums()
        if self.progress and state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="train", unit="step"
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch = state.global_step // self.trainer.steps_per_epoch
        self.trainer.batches.set_epoch(epoch)
        self.trainer.task.set_epoch(epoch)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.hooks.before_step(state.global_step + 1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.hooks.after_step(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        if state.global_step >= state.max_steps:
            control.should_log = True  # else a short run, or the rest of a long one, is not seen
        ends_epoch = state.global_step % self.trainer.steps_per_epoch == 0
        if self.trainer.options.evaluate == "epoch" and ends_epoch:
            # A checkpoint taken here would resume after the evaluation that is still to come.
            control.should_save = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.options.evaluate == "epoch" and self.trainer.options.save_every:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.4f}", lr=f"{logs['learning_rate']:.2e}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
