"""What a method or a task does around the steps of a training run, beside its loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class TrainingHooks:
    """Called by `mmtune.training.train`; a method or a task overrides what it needs.

    Steps are optimiser steps, counted from 1. What a hook draws at random must follow from the
    run's seed and the step alone, and what it remembers must be in its state: a run that is killed
    and resumed ends bit for bit like one that was not.

    Attributes:
        replayable: whether Python does the same in each pass, whatever the step: only then can
            passes be recorded once and replayed.
    """

    replayable = True

    def before_step(self, step: int) -> None:
        """Before the forward pass of a step (once, however many micro-batches it has)."""

    def penalty(self) -> Tensor | None:
        """A scalar that is added to the task's loss in every micro-batch."""
        return None

    def after_step(self, step: int) -> None:
        """After the optimiser's step; gradients (clipped, averaged over the step) are still there.

        An evaluation that follows the step sees the model as this leaves it.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the parameters."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""

    def finish(self) -> None:
        """After the last step, on the weights that the run ends with."""


class JoinedHooks(TrainingHooks):
    """Several hooks as one, called in order.

    Args:
        parts: name -> hooks; the name begins the keys of their state.
    """

    def __init__(self, parts: Mapping[str, TrainingHooks]) -> None:
        self.parts = dict(parts)
        self.replayable = all(hooks.replayable for hooks in self.parts.values())

    def before_step(self, step: int) -> None:
        for hooks in self.parts.values():
            hooks.before_step(step)

    def penalty(self) -> Tensor | None:
        found = [p for hooks in self.parts.values() if (p := hooks.penalty()) is not None]
        return sum(found[1:], found[0]) if found else None

    def after_step(self, step: int) -> None:
        for hooks in self.parts.values():
            hooks.after_step(step)

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value
            for name, hooks in self.parts.items()
            for key, value in hooks.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, hooks in self.parts.items():
            own = {
                k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")
            }
            if own:
                hooks.load_state_dict(own)

    def finish(self) -> None:
        for hooks in self.parts.values():
            hooks.finish()
