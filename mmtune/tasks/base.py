"""Why a model is tuned: what every task gives the trainer, the command line and the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from mmtune.backbones.base import Loaded


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


class Task(Protocol):
    """One objective. Built from its options and a loaded model; holds its data.

    `options` is a dataclass type: its fields are the keys below `task:` in a run config.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    options: ClassVar[type]
    train_dataset: Dataset

    def __init__(self, options: Any, data: Any, loaded: Loaded, seed: int) -> None: ...

    def set_epoch(self, epoch: int) -> None:
        """Tell augmentation which epoch it is: a sample depends on (seed, epoch, index) only."""

    def collate(self, samples: Sequence[Any]) -> dict[str, Tensor]:
        """Samples -> one batch on the CPU."""
        ...

    def before_training(self, model: nn.Module) -> None:
        """Choose what else trains (a temperature); after PEFT, before the optimiser."""
        ...

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """The scalar to minimise for this process's batch, and numbers worth logging."""
        ...

    def evaluate(self, model: nn.Module, split: str = "test", progress: bool = True) -> Evaluation:
        """Evaluate `model` (possibly wrapped) on a split, in eval mode; restores its mode after."""
        ...

    def compare(self, before: Evaluation, after: Evaluation) -> dict[str, Metric]:
        """Paired difference after - before, per metric, with intervals over the same queries."""
        ...

    def gallery(self, before: Evaluation, after: Evaluation, limit: int = 12) -> list[GalleryItem]:
        """Queries whose results changed, gains and losses both, most changed first."""
        ...


TaskFactory = Callable[..., Task]
__all__ = ["Evaluation", "GalleryItem", "Metric", "Path", "Shown", "Task", "TaskFactory"]
