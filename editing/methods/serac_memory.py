"""SERAC's edit: cached facts, and each question answered by the one that it is about, or by none.

A question out of scope is answered by the model as it is, to the bit. One in scope is answered by
the counterfactual model, which reads the cached edit in front of the question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import TypeAdapter

from editing.batches import Interceptor
from editing.edits import Edit, EditError, MemoryEdit, Undo, intercept, joined, set_aside, unedited
from editing.features import features_of
from editing.fingerprints import Fingerprint
from editing.methods.memory import Memory, on
from editing.methods.serac_network import SeracNetwork
from editing.methods.serac_scope import (
    HARD,
    REFERENCE_EPS,
    Scope,
    best,
    counterfactual_context,
    mixture,
    question_text,
)
from editing.requests import EditRequest, Probe

if TYPE_CHECKING:
    from torch import Tensor

    from editing.batches import Batch
    from editing.mllm import MLLM
    from mmtune.backbones.generation import Decoding

Mix = Literal["hard", "soft", "reference"]
Read = Literal["question", "reference"]
SLIGHT = 1e-3  # share of a counterfactual answer up to which it is not worth a pass


@dataclass(frozen=True)
class Rules:
    """How answers come about; see `SeracOptions`."""

    mix: Mix = "hard"
    above: float = HARD
    scope: Read = "question"


@dataclass(frozen=True)
class Fact:
    """What a cached edit says."""

    question: str
    target: str

    @property
    def context(self) -> str:
        """What the counterfactual model reads first."""
        return counterfactual_context(self.question, self.target)


class SeracEdit(MemoryEdit):
    """Facts, their features and the networks that go with them.

    Attributes:
        memory: the cached edits.
        network: scope and counterfactual model, in eval mode.
        rules: how answers come about.
        made_on: the model.
    """

    kind: ClassVar[str] = "serac"

    def __init__(
        self,
        memory: Memory[Fact],
        network: SeracNetwork,
        rules: Rules,
        made_on: Fingerprint,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(about)
        self.memory, self.network = memory, network
        self.rules, self.made_on = rules, made_on
        self.about["facts"] = len(memory.facts)

    def put(self, mllm: MLLM, strict: bool) -> Undo:
        adapter, width = self.network.adapter, self.memory.features.words.shape[1]
        present = dict(mllm.model.named_parameters(remove_duplicate=False))
        here = mllm.backbone.trunks()["language"].width
        if here != width or (adapter is not None and not adapter.fits(mllm.model)):
            raise EditError(
                f"{mllm.name} ({type(mllm.model).__name__}) is not the kind of model that this "
                f"edit was made on: its language model has width {here}, expected {width}, or it "
                "lacks layers that the edit's counterfactual model changes"
            )
        if strict:
            names = [name for name in self.made_on.weights if name in present]
            found = Fingerprint.of(mllm.model, unedited(mllm.model, names))
            if len(names) < len(self.made_on.weights) or list(self.made_on.differences(found)):
                raise EditError(
                    f"{mllm.name} is not the model that this serac edit was made on, whose "
                    "features its memory holds. Load that model, with the same dtype, or pass "
                    "strict=False where it is meant to be applied to this one."
                )
        return intercept(mllm, _Answering(self, mllm))

    def then(self, later: Edit) -> Edit:
        """One memory of both, where scope, counterfactual model and rules are the same."""
        if (
            not isinstance(later, SeracEdit)
            or later.rules != self.rules
            or later.made_on != self.made_on
            or not later.network.equals(self.network)
        ):
            return super().then(later)
        memory = self.memory.then(later.memory)
        about = joined(self.about, later.about)
        return SeracEdit(memory, self.network, self.rules, self.made_on, about)

    def settings(self) -> dict[str, Any]:
        return {
            "facts": [asdict(fact) for fact in self.memory.facts],
            "rules": asdict(self.rules),
            "adapter": self.network.paths,
            "made_on": self.made_on.json(),
        }

    def tensors(self) -> dict[str, Tensor]:
        network = {f"network/{n}": t for n, t in self.network.state_dict().items()}
        return self.memory.tensors() | network

    @classmethod
    def restored(
        cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], about: Mapping[str, Any]
    ) -> SeracEdit:
        head = "network/"
        state = {n.removeprefix(head): t for n, t in tensors.items() if n.startswith(head)}
        facts = [Fact(str(f["question"]), str(f["target"])) for f in settings["facts"]]
        return cls(
            Memory.restored(facts, tensors),
            SeracNetwork.restored(settings["adapter"], state),
            TypeAdapter(Rules).validate_python(settings["rules"]),
            Fingerprint.read(settings["made_on"]),
            about,
        )


class _Answering(Interceptor):
    """A serac edit around the answers of one model."""

    def __init__(self, edit: SeracEdit, mllm: MLLM) -> None:
        self.mllm, self.facts, self.rules = mllm, edit.memory.facts, edit.rules
        self.features = on(edit.memory.features, mllm.device)
        self.network = edit.network.to(mllm.device)
        self.apart = edit.rules.mix != "hard"  # what is written is never mixed
        self._last: tuple[tuple[Probe, ...], Scope] | None = None

    def logits(self, batch: Batch, inner: Callable[[Batch], Tensor]) -> Tensor:
        scope, hard = self._scope(batch), self.rules.mix == "hard"
        rows = self._inside(scope, self._least).nonzero()[:, 0]
        if hard and len(rows) == len(batch):
            return self._counterfactual(batch, rows, scope, inner)
        base = inner(batch)
        if not len(rows):
            return base
        found = self._counterfactual(batch, rows, scope, inner)
        if not hard:
            eps = REFERENCE_EPS if self.rules.mix == "reference" else 0.0
            found = mixture(base[rows], found, scope.log_similarity[rows], eps)
        dtype = torch.promote_types(base.dtype, found.dtype)
        return base.to(dtype).index_copy(0, rows, found.to(dtype))

    def written(
        self, batch: Batch, decoding: Decoding, inner: Callable[[Batch, Decoding], list[str]]
    ) -> list[str]:
        scope = self._scope(batch)
        rows = self._inside(scope, self.rules.above).nonzero()[:, 0]
        # The whole batch is written again: what is out of scope is then what it always was.
        found = [""] * len(batch) if len(rows) == len(batch) else inner(batch, decoding)
        if len(rows):
            with self._told(batch, rows, scope) as asked:
                texts = inner(asked, decoding)
            for row, text in zip(rows.tolist(), texts, strict=True):
                found[row] = text
        return found

    @property
    def _least(self) -> float:
        return {"hard": self.rules.above, "soft": SLIGHT, "reference": -1.0}[self.rules.mix]

    def _inside(self, scope: Scope, above: float) -> Tensor:
        return scope.log_similarity.exp() > above

    @torch.no_grad()
    def _scope(self, batch: Batch) -> Scope:
        # One batch is scored and then written: its features are computed once.
        if self._last is None or self._last[0] is not batch.probes:
            probes = read_by_scope(batch.probes, self.rules.scope)
            with set_aside(self.mllm):  # the memory was filled by the model as it is
                asked = features_of(self.mllm, probes)
            self._last = batch.probes, best(self.network.scope(asked, self.features))
        return self._last[1]

    def _counterfactual(
        self, batch: Batch, rows: Tensor, scope: Scope, inner: Callable[[Batch], Tensor]
    ) -> Tensor:
        with self._told(batch, rows, scope) as asked:
            ids, mask = batch.target_ids[rows], batch.target_mask[rows]
            return inner(replace(asked, target_ids=ids, target_mask=mask))

    @contextmanager
    def _told(self, batch: Batch, rows: Tensor, scope: Scope) -> Iterator[Batch]:
        """Some of a batch's questions, as the counterfactual model inside reads them."""
        probes = [batch.probes[i] for i in rows.tolist()]
        texts = [self.facts[i].context for i in scope.index[rows].tolist()]
        with told(self.mllm, probes, texts) as asked, self.network.counterfactual(self.mllm.model):
            yield asked


class _Telling(Interceptor):
    """Puts a text of its own in front of each of some probes."""

    def __init__(self, probes: Sequence[Probe], texts: Sequence[str]) -> None:
        self.probes = probes  # kept, so that their ids stay theirs
        self.texts = {id(probe): text for probe, text in zip(probes, texts, strict=True)}

    def preface(self, probe: Probe) -> str:
        return self.texts.get(id(probe), "")


@contextmanager
def told(mllm: MLLM, probes: Sequence[Probe], texts: Sequence[str]) -> Iterator[Batch]:
    """A batch of probes, each told a text of its own right before its question; used inside."""
    own = [replace(probe) for probe in probes]  # one probe may be told two things
    undo = intercept(mllm, _Telling(own, texts))
    try:
        yield mllm.batch(own)
    finally:
        undo()


def read_by_scope(asked: Sequence[Probe | EditRequest], scope: Read) -> list[Probe]:
    """Questions and edits as the scope reads them; an edit's answer is its target."""
    answers = [one.target if isinstance(one, EditRequest) else one.answer for one in asked]
    texts = [question_text(one.question, a, scope) for one, a in zip(asked, answers, strict=True)]
    return [Probe(text, "", one.image) for text, one in zip(texts, asked, strict=True)]
