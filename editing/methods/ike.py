"""IKE: the new fact, and demonstrations of how facts are used, in front of every question.

The weights are not touched, so there is no region: what is edited is what the model reads.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor, nn

from editing.batches import Interceptor
from editing.edits import Edit, EditError, MemoryEdit, Undo, intercept, joined, set_aside
from editing.features import features_of
from editing.methods.base import Editor
from editing.methods.ike_embedders import Embedder, embed
from editing.methods.ike_retrieval import (
    Order,
    context,
    copy_demonstration,
    demonstrations,
    retrieve,
    shown,
)
from editing.methods.memory import Memory, on
from editing.methods.serac_network import FixedScope
from editing.mllm import WRITTEN
from editing.requests import EditRecord, EditRequest
from mmtune.data.records import DataError, Problem

if TYPE_CHECKING:
    from editing.mllm import MLLM
    from editing.requests import Probe

Facts = Literal["nearest", "all"]
SEAM = 4  # tokens by which a text and a prompt may be longer together than each alone
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IkeOptions:
    """Settings of IKE.

    Attributes:
        pool: file of edit records, of the training split, that demonstrations are made of. Empty,
            or with k 0, the fact alone stands in front of the question.
        pool_limit: records that are read of it; None takes all.
        k: demonstrations at most: the nearest to the new fact.
        order: "best-last" puts the nearest beside the question; "reference" farthest from it, as
            MMEdit's released code does.
        embedder: what tells how near they are: "own" features of the edited model, from which the
            pool's mean is subtracted, or "minilm", the sentence encoder of the paper.
        facts: after several edits, which of them a question is told: the "nearest" in words and
            image, with its demonstrations; or "all", with the demonstrations of the last.
        seed: nothing is drawn.
    """

    pool: str = ""
    pool_limit: Annotated[int, Field(ge=1)] | None = None
    k: Annotated[int, Field(ge=0)] = 32
    order: Order = "best-last"
    embedder: Embedder = "own"
    facts: Facts = "nearest"
    seed: int = 0


@dataclass(frozen=True)
class Told:
    """A fact with its demonstrations, nearest first."""

    question: str
    target: str
    demonstrations: tuple[str, ...] = ()

    @property
    def request(self) -> EditRequest:
        """The fact alone."""
        return EditRequest(self.question, self.target)


class IkeEdit(MemoryEdit):
    """Text in front of every question, which may depend on the question.

    Where a prompt would not fit, the demonstrations farthest from the fact are left out.

    Attributes:
        memory: the facts.
        order: of demonstrations, see `IkeOptions`.
        facts: which facts a question is told, see `IkeOptions`.
        room: tokens that a prompt must leave for the answer.
        about: `demonstrations` is how many stand in front of each fact's own question, the fact's
            own among them, and `left_out` how many did not fit; a longer question has fewer.
    """

    kind: ClassVar[str] = "ike"

    def __init__(
        self,
        memory: Memory[Told],
        order: Order,
        facts: Facts,
        room: int,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(about)
        self.memory, self.room = memory, room
        self.order: Order = order
        self.facts: Facts = facts

    def put(self, mllm: MLLM, strict: bool) -> Undo:
        width, here = self.memory.features.words.shape[1], mllm.backbone.trunks()["language"].width
        if self.facts == "nearest" and len(self.memory.facts) > 1 and here != width:
            raise EditError(
                f"this ike edit finds the nearest of {len(self.memory.facts)} facts by features of "
                f"width {width}, and the language model of {mllm.name} has width {here}: apply it "
                "to the model that it was made on"
            )
        return intercept(mllm, InFront(self, mllm))

    def text(self, numbers: Sequence[int], count: int) -> str:
        """What is said before a question.

        Args:
            numbers: of the facts.
            count: demonstrations, the last fact's own among them.
        """
        *others, last = [self.memory.facts[i] for i in numbers]
        pool = last.demonstrations
        nearest = range(min(count - 1, len(pool)))
        examples = shown(pool, nearest, last.request, self.order) if count else []
        facts = [context([], one.request).removesuffix("Prompt: ") for one in others]
        return context([*examples, *facts], last.request)

    def then(self, later: Edit) -> Edit:
        """One memory of both."""
        if not isinstance(later, IkeEdit) or (later.order, later.facts) != (self.order, self.facts):
            return super().then(later)
        if later.memory.features.words.shape[1] != self.memory.features.words.shape[1]:
            return super().then(later)
        about = joined(self.about, later.about)
        for key in ("demonstrations", "left_out"):
            about[key] = [*self.about.get(key, ()), *later.about.get(key, ())]
        memory, room = self.memory.then(later.memory), max(self.room, later.room)
        return IkeEdit(memory, self.order, self.facts, room, about)

    def settings(self) -> dict[str, Any]:
        return {
            "told": [asdict(fact) for fact in self.memory.facts],
            "order": self.order,
            "facts": self.facts,
            "room": self.room,
        }

    def tensors(self) -> dict[str, Tensor]:
        return self.memory.tensors()

    @classmethod
    def restored(
        cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], about: Mapping[str, Any]
    ) -> IkeEdit:
        facts = TypeAdapter(list[Told]).validate_python(settings["told"])
        order = TypeAdapter(Order).validate_python(settings["order"])
        which = TypeAdapter(Facts).validate_python(settings["facts"])
        return cls(Memory.restored(facts, tensors), order, which, int(settings["room"]), about)


class InFront(Interceptor):
    """An ike edit on one model."""

    def __init__(self, edit: IkeEdit, mllm: MLLM) -> None:
        self.edit, self.mllm = edit, mllm
        self.features = on(edit.memory.features, mllm.device)
        self.scope = FixedScope(0.0, 0.0).to(mllm.device)  # words and image count the same
        self._texts: dict[Any, str] = {}

    def preface(self, probe: Probe) -> str:
        key = probe.question, probe.image
        if key not in self._texts:
            numbers = self._told(probe)
            self._texts[key] = self.edit.text(numbers, self.count(probe, numbers))
        return self._texts[key]

    def count(self, probe: Probe, numbers: Sequence[int]) -> int:
        """Demonstrations that fit before a question, the last fact's own among them."""
        own = len(self.edit.memory.facts[numbers[-1]].demonstrations)
        room = self.mllm.room(probe) if own else None
        for count in range(own + 1 if own else 0, 0, -1):
            text = self.edit.text(numbers, count)
            words = self.mllm.tokenizer(text, add_special_tokens=False)["input_ids"]
            if room is None or len(words) + SEAM + self.edit.room <= room:
                return count
        return 0  # with none it may be too long, as the model will say

    def _told(self, probe: Probe) -> list[int]:
        every = list(range(len(self.edit.memory.facts)))
        if self.edit.facts == "all" or len(every) == 1:
            return every
        with set_aside(self.mllm):  # the facts were read by the model as it is
            asked = features_of(self.mllm, [probe])
        return [int(self.scope(asked, self.features).argmax())]


class Ike(Editor):
    """In-context editing.

        p(y | x)  becomes  p(y | demonstration_k, .., demonstration_1, new fact, x)

    Numbers changed: none; the prompt grows by the fact and at most k demonstrations.
    """

    name: ClassVar[str] = "ike"
    summary: ClassVar[str] = "the new fact and demonstrations in the prompt; weights untouched"
    source: ClassVar[str] = "IKE, arXiv 2305.12740; multimodal in MMEdit, arXiv 2310.08475"
    options: ClassVar[type] = IkeOptions

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._pool: list[str] = []
        self._embedded: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()

    def make(self, mllm: MLLM, requests: Sequence[EditRequest], generator: torch.Generator) -> Edit:
        near = self._nearest(mllm, requests)
        facts = [
            Told(request.question, request.target.strip(), own)
            for request, own in zip(requests, near, strict=True)
        ]
        with set_aside(mllm):
            memory = Memory.of(facts, features_of(mllm, requests))
            batch = mllm.batch(requests)
        room = max(WRITTEN, int(batch.target_mask.sum(1).max()))
        edit = IkeEdit(memory, self.settings.order, self.settings.facts, room)
        if any(near):
            front, asked = InFront(edit, mllm), dict(zip(facts, batch.probes, strict=True))
            every = list(enumerate(memory.facts))
            counts = [front.count(asked[fact], [number]) for number, fact in every]
            edit.about["demonstrations"] = counts
            edit.about["left_out"] = [
                len(fact.demonstrations) + 1 - count
                for fact, count in zip(memory.facts, counts, strict=True)
            ]
        return edit

    def _nearest(self, mllm: MLLM, requests: Sequence[EditRequest]) -> list[tuple[str, ...]]:
        """The demonstrations of each request, nearest first."""
        if not self.settings.pool or not self.settings.k:
            return [()] * len(requests)
        pool, embedder = self._demonstrations(), self.settings.embedder
        if mllm.model not in self._embedded:
            self._embedded[mllm.model] = embed(embedder, mllm, pool)
        known = self._embedded[mllm.model]
        asked = embed(embedder, mllm, [copy_demonstration(request) for request in requests])
        # States of a language model have a large part in common, which tells nothing.
        middle = known.mean(0) if embedder == "own" else 0
        found = [retrieve(query - middle, known - middle, self.settings.k) for query in asked]
        return [tuple(pool[i] for i in one.order) for one in found]

    def _demonstrations(self) -> list[str]:
        from editing.datasets import read_records

        if not self._pool:
            path, limit = self.settings.pool, self.settings.pool_limit
            every = list(read_records(path, limit=limit))
            records = [one for one in every if isinstance(one, EditRecord)]
            if len(records) < len(every):
                log.warning("%s: %d bad records left out", path, len(every) - len(records))
            if not records:
                problems = [one for one in every if isinstance(one, Problem)]
                empty = Problem(path, "no edit record for demonstrations")
                raise DataError([empty, *problems], "With k: 0 none are needed.")
            self._pool = demonstrations(records)
        return self._pool


EDITORS = (Ike,)
