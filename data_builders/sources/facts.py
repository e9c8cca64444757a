"""Questions of general knowledge that ship with the project: a small pool of text locality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_builders import general_facts
from data_builders.pictures import Pictures
from data_builders.samples import Outcome, Sample
from data_builders.sources.base import Source

PARTS = ("test", "train")


@dataclass(frozen=True)
class FactsOptions:
    """Which of the facts.

    Attributes:
        split: "test" and "train" have no question in common, so that no editor is trained on what
            it is measured by; "all" has both.
    """

    split: Literal["all", "test", "train"] = "all"


class Facts(Source[FactsOptions]):
    """One sample a question; its answer is the word that a right one holds."""

    name = "facts"
    options = FactsOptions
    licence = "Apache-2.0 (this project)"

    def roots(self) -> Mapping[str, Path]:
        return {}

    def files(self) -> list[str]:
        return [str(general_facts.__file__)]

    def read(self, pictures: Pictures) -> Iterator[Outcome]:
        for number, (question, word) in enumerate(general_facts.facts().items()):
            if self.settings.split in ("all", PARTS[number % len(PARTS)]):
                yield Sample(id=f"fact-{number}", question=question, answers=(word,))
