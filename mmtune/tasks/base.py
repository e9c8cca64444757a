"""Why a model is tuned: what every task gives the trainer, the command line and the report."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from mmtune.backbones.base import Backbone, Loaded
    from mmtune.tuners.hooks import TrainingHooks


@dataclass(frozen=True)
class Metric:
    """One number with its 95 % interval. Percent metrics are in [0, 100]; n counts queries."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: name -> Metric, in the order in which a table shows them.
        primary: the name of the metric that ranks checkpoints; higher is better.
        details: task-specific, for paired intervals and the gallery (ranks, top results); not
        saved.
        seconds: wall time.
    """

    metrics: dict[str, Metric]
    primary: str
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Shown:
    """One cell of a gallery: a picture, a text, or both; `correct` colours it (None: neutral)."""

    image: Image | None = None
    text: str = ""
    correct: bool | None = None


@dataclass(frozen=True)
class GalleryItem:
    """One query whose result changed: the query, what came back before, and after."""

    title: str
    query: Shown
    before: list[Shown]
    after: list[Shown]


class Task(ABC):
    """One objective. Built as cls(options, data, loaded, seed); holds its data.

    `options` is a dataclass type: its fields are the keys below `task:` in a run config.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    options: ClassVar[type]
    train_dataset: Dataset

    @abstractmethod
    def __init__(self, options: Any, data: Any, loaded: Loaded, seed: int) -> None: ...

    def set_epoch(self, epoch: int) -> None:  # noqa: B027 (nothing to do is a good answer)
        """Tell augmentation which epoch it is: a sample depends on (seed, epoch, index) only."""

    @abstractmethod
    def collate(self, samples: Sequence[Any]) -> dict[str, Tensor]:
        """Samples -> one batch on the CPU."""

    @classmethod
    def heads(cls, options: Any, backbone: Backbone) -> list[str]:
        """Paths of modules of the stock model that are trained whole, and kept with the adapter.

        PEFT trains copies of them (`modules_to_save`); the stock ones stay as they are.
        """
        return []

    @classmethod
    def reads(cls, options: Any, split: str) -> tuple[str, ...]:
        """The roles (train, val, test) whose data an evaluation of `split` needs."""
        return (split,)

    def before_training(self, model: nn.Module) -> None:  # noqa: B027
        """Choose what else trains (a temperature); after PEFT, before the optimiser."""

    def hooks(self, model: nn.Module, total_steps: int) -> TrainingHooks:
        """What happens around the optimiser's steps: a momentum encoder, a queue, a schedule.

        Called once before training, on each process; checkpoints hold the state of the first
        process's hooks, from which all of them resume.
        """
        from mmtune.tuners.hooks import TrainingHooks

        return TrainingHooks()

    @abstractmethod
    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """The scalar to minimise for this process's batch, and numbers worth logging."""

    @abstractmethod
    def evaluate(self, model: nn.Module, split: str = "test", progress: bool = True) -> Evaluation:
        """Evaluate `model` (possibly wrapped) on a split, in eval mode; restores its mode after."""

    @abstractmethod
    def compare(self, before: Evaluation, after: Evaluation) -> dict[str, Metric]:
        """Paired difference after - before, per metric, with intervals over the same queries."""

    @abstractmethod
    def gallery(self, before: Evaluation, after: Evaluation, limit: int = 12) -> list[GalleryItem]:
        """Queries whose results changed, gains and losses both, most changed first."""


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters of a model are."""
    return next(model.parameters()).device


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the first floating-point parameter: that of a stock model's inputs."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def on_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors of a batch on a device."""
    return {name: value.to(device) for name, value in batch.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; after it every module has the mode that it had."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def places_for_gains(limit: int, losses: int) -> int:
    """How many of a gallery's `limit` places gains may take: half, and what losses leave free."""
    return max(limit - limit // 2, limit - losses)


def require_same_split(before: Evaluation, after: Evaluation) -> None:
    """ValueError where two evaluations are not of one split, made in this process."""
    one, two = before.details.get("split"), after.details.get("split")
    if one is None or one != two:
        raise ValueError(
            f"expected two evaluations of one split, made in this process; got {one}, {two}"
        )


def first_process() -> bool:
    """Whether this process writes files and prints (rank 0, or the only one)."""
    return os.environ.get("RANK", "0") == "0"
