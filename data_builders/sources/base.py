"""What a source of samples is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

if TYPE_CHECKING:
    from data_builders.pictures import Pictures
    from data_builders.samples import Outcome

O = TypeVar("O")  # noqa: E741


class Source(ABC, Generic[O]):
    """Reads samples from files in a format that people have.

    Attributes:
        name: its `format` in configs.
        options: the frozen dataclass of its settings.
        licence: of its texts, for the data card; empty where that is the user's affair.
    """

    name: ClassVar[str]
    options: ClassVar[type]
    licence: ClassVar[str] = ""

    def __init__(self, settings: O, root: str = "source") -> None:
        self.settings, self.root = settings, root

    @abstractmethod
    def roots(self) -> Mapping[str, Path]:
        """Roots of `Pictures` that its references use, such as {self.root: images folder}.

        `root` is "source" for the samples, "text" and "image" for the pools of locality, so that
        several sources do not get in each other's way.
        """

    @abstractmethod
    def files(self) -> list[str]:
        """The files that it reads apart from images; they are hashed."""

    @abstractmethod
    def read(self, pictures: Pictures) -> Iterator[Outcome]:
        """Samples in the order of the files; a broken record is a `Rejected` with `fault`.

        A source whose pictures are not files of their own writes them with `pictures.save`.

        Raises:
            DataError: a file that cannot be read at all, or holds no sample.
        """
