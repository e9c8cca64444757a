"""What an edit must change and what it must not: one record holds both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmtune.data.records import MediaRef


@dataclass(frozen=True)
class Probe:
    """A question whose answer is looked at before and after an edit.

    Attributes:
        question: the text; empty where the model is to caption the image.
        answer: the right answer, or what the source says the model answers.
        image: None where the question is about no image.
        fields: everything else that the source says about it (a hop, a reasoning type).
    """

    question: str
    answer: str
    image: MediaRef | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EditRequest:
    """One fact to be changed: asked `question` about `image`, the model is to say `target`.

    Attributes:
        question: the text.
        target: the new answer, not empty.
        image: None for an edit of knowledge that no image shows.
        id: what the source calls it.
        subject: what the question is about, word for word as it stands there; empty where that is
            not known, or only the image shows it.
    """

    question: str
    target: str
    image: MediaRef | None = None
    id: str = ""
    subject: str = ""


@dataclass(frozen=True)
class EditRecord:
    """A request with what measures it.

    Attributes:
        request: the edit.
        prediction: what the unedited model said according to the source; None where it is silent.
        text_generality: the same image asked in other words; the target is right.
        image_generality: another image of the same thing; the target is right.
        text_locality: questions without an image, which the edit must not touch.
        image_locality: questions about other images, which the edit must not touch.
        portability: questions whose answer follows from the edit.
        id: what the source calls the record.
        where: file and record, for messages.
        fields: everything else that the source says about it.
    """

    request: EditRequest
    prediction: str | None = None
    text_generality: tuple[Probe, ...] = ()
    image_generality: tuple[Probe, ...] = ()
    text_locality: tuple[Probe, ...] = ()
    image_locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()
    id: str = ""
    where: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
