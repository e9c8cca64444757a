"""The zoo's drawings with questions about them: a small source, and pool, that is always there."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_builders.pictures import Pictures
from data_builders.samples import Outcome, Sample, seed_of
from data_builders.sources.base import Source
from data_builders.sources.checks import settled
from mmtune.zoo import data_path
from mmtune.zoo.tiny_llava.questions import ask, drawings
from mmtune.zoo.tiny_llava.things import Thing, with_article

# Drawings that the zoo's models never saw; those that they learnt from serve to train editors.
SPLITS = {
    "test": (
        ("clipart", "test"),
        ("clipart", "test-text"),
        ("clipart", "val"),
        ("clipart-animals", "test"),
        ("clipart-animals", "val"),
        ("clipart-food", "test"),
        ("clipart-food", "val"),
    ),
    "train": (("clipart", "train"), ("clipart-animals", "train"), ("clipart-food", "train")),
}
LICENCE = "public domain (Open Clip Art Library)"
Kind = Literal["name", "kind", "presence", "choice"]


@dataclass(frozen=True)
class ClipartOptions:
    """Drawings and what is asked about them.

    Attributes:
        split: "test" for drawings that the zoo's models never saw, "train" for the others.
        kinds: what is asked: the thing's name, its kind, whether it is there (yes or no), or which
            of two it is.
        seed: of the order and the wordings.
    """

    split: Literal["test", "train"] = "test"
    kinds: list[Kind] = field(default_factory=lambda: ["name", "kind"])
    seed: int = 0


class Clipart(Source[ClipartOptions]):
    """One sample a drawing and kind of question, in random order; pictures are written as read."""

    name = "clipart"
    options = ClipartOptions
    licence = LICENCE

    def roots(self) -> Mapping[str, Path]:
        return {}  # pictures are among those that the build makes

    def files(self) -> list[str]:
        return [str(data_path(name, part)) for name, part in SPLITS[self.settings.split]]

    def read(self, pictures: Pictures) -> Iterator[Outcome]:
        rows = [row for name, part in SPLITS[self.settings.split] for row in drawings(name, part)]
        return settled(self._every(rows, pictures), pictures, f"clipart {self.settings.split}")

    def _every(self, rows: Sequence[Mapping[str, Any]], pictures: Pictures) -> Iterator[Outcome]:
        things = [row["thing"] for row in rows]
        asked = [(row, kind) for row in rows for kind in self.settings.kinds]
        seed = self.settings.seed
        asked.sort(key=lambda pair: seed_of(seed, "order", pair[0]["id"], pair[1]))
        written: dict[str, str] = {}
        for row, kind in asked:
            if row["id"] not in written:
                written[row["id"]] = pictures.save(_file(row), row["image"]["bytes"])
            yield self._sample(row, kind, things, written[row["id"]])

    def _sample(
        self, row: Mapping[str, Any], kind: str, things: Sequence[Thing], image: str
    ) -> Sample:
        # What is asked of a drawing depends on it and the seed, not on which others there are.
        draw = random.Random(seed_of(self.settings.seed, "question", row["id"], kind))
        question = ask(row, kind, draw, things)
        return Sample(
            id=f"{row['id'].removesuffix('.svg')}#{kind}",
            question=question.text,
            image=image,
            answers=(question.answer,),
            captions=captions_of(row),
            concept=row["thing"].noun,
            licence=LICENCE,
            fields={"kind": kind, "rephrase": question.rephrased},
        )


def captions_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What a drawing shows, in sentences: by its title where that names the thing, and its thing.

    "a drawing of a red apple", "a drawing of an apple".
    """
    thing, title = row["thing"], row["title"]
    named = thing.noun in title and title.isascii() and title[:1].isalpha()
    titled = title if thing.bare or not named else with_article(title)
    every = [titled, thing.named] if named else [thing.named]
    return tuple(dict.fromkeys(f"a drawing of {text}" for text in every))


def _file(row: Mapping[str, Any]) -> str:
    """A name of its own for each drawing: ids are paths."""
    ending = "png" if row["image"]["bytes"].startswith(b"\x89PNG") else "jpg"
    return f"clipart/{row['id'].removesuffix('.svg').replace('/', '-')}.{ending}"
