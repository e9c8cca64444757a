"""What a stage of a build is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from data_builders.samples import seed_of

if TYPE_CHECKING:
    from pathlib import Path

    from data_builders.pictures import Pictures
    from data_builders.samples import Outcome, Sample
    from editing.config import EditModelOptions

O = TypeVar("O")  # noqa: E741


@dataclass(frozen=True)
class Context:
    """What every stage of a build is told; it can be pickled.

    Attributes:
        seed: of the build.
        model: the model that data are made for.
        pictures: where pictures are read and written.
        folder: of the build.
        device: of this process, such as "cpu" or "cuda:1".
    """

    seed: int
    model: EditModelOptions
    pictures: Pictures
    folder: Path
    device: str = "cpu"

    def seed_of(self, *parts: str) -> int:
        """A seed for what is drawn for one sample: name the stage, the sample, and what for."""
        return seed_of(self.seed, *parts)


class Stage(ABC, Generic[O]):
    """Turns samples into samples, one independently of the others.

    A stage is made anew in every process that runs it. It is given the samples of a shard in the
    order of the source, always the same ones whatever the number of processes, so that it may batch
    them; what becomes of a sample depends on nothing that ran before in the process.

    Attributes:
        slot: its place in a recipe, and the section of its settings: "select", "rephrase", …
        name: among the stages that fit there; `by` in the section, such as `by: diffusers`.
        options: the frozen dataclass of its settings.
        version: raise it when the same settings give another result: outputs become stale.
    """

    slot: ClassVar[str]
    name: ClassVar[str]
    options: ClassVar[type]
    version: ClassVar[int] = 1

    def __init__(self, settings: O, context: Context) -> None:
        self.settings, self.context = settings, context

    def open(self) -> None:
        """Load models; called once in a process, before `run`, and only if there is work.

        Raises:
            ValueError: settings that cannot work; the message says how to mend them.
        """

    @abstractmethod
    def run(self, samples: Sequence[Sample]) -> list[Outcome]:
        """One outcome a sample, in the same order.

        An exception ends the build and loses this shard alone; what is wrong with one sample is a
        `Rejected` with `fault`.
        """

    def files(self) -> list[str]:
        """Files that the outcome depends on beside settings and samples; they are hashed."""
        return []

    @classmethod
    def described(cls, settings: O) -> dict[str, Any]:
        """What of the settings goes into the data card."""
        from mmtune.yaml_source import plain

        return plain(settings)
