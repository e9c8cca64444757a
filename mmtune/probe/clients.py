"""Who answers: what is sent to a model, and what comes back."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """A question with its answer, shown before the one that is asked.

    Attributes:
        text: the question as it would be sent.
        answer: as a model should write it.
        images: encoded pictures (PNG).
    """

    text: str
    answer: str
    images: tuple[bytes, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Sent:
    """One request, exactly as it goes out.

    Attributes:
        text: the question, with how it is to be answered.
        images: encoded pictures (PNG), with what was drawn on them.
        examples: shown before it, in order.
        most: tokens of the answer at most.
    """

    text: str
    images: tuple[bytes, ...] = field(default=(), repr=False)
    examples: tuple[Example, ...] = ()
    most: int = 32

    def digest(self) -> str:
        """Names the request by all that it holds."""
        found = hashlib.sha256(f"{self.most}\0{self.text}".encode())
        for example in self.examples:
            found.update(f"\0{example.text}\0{example.answer}".encode())
        for image in (*self.images, *(i for example in self.examples for i in example.images)):
            found.update(hashlib.sha256(image).digest())
        return found.hexdigest()[:24]


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        text: of the answer; empty where there is none.
        error: why there is none, after all tries.
        tries: requests made.
        note: what could not be sent as it was meant, such as the pictures of examples.
    """

    text: str
    error: str = ""
    tries: int = 1
    note: str = ""


class Client(ABC):
    """Asks a model; never raises for one request, whatever comes back.

    Attributes:
        name: of the model, in tables.
        batch: requests that it likes to be given at once.
    """

    name: str
    batch: int = 1

    @abstractmethod
    def ask(self, sent: Sequence[Sent]) -> list[Reply]:
        """One reply a request, in order."""
