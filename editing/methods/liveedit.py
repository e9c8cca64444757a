"""LiveEdit-style: a low-rank expert for each edit, found by its image first, then by its words.

At one layer of the language model an expert adds relu(norm(h) U^T) V to the hidden states h. The
experts of edits about the question's image (hard routing, which nothing passes that asks about
another image) whose questions are like the one asked are mixed by how like they are (soft routing).
An edit without an image is found by its words alone. The base's answers to all else stay what they
are, to the bit.

Source: Chen et al., LiveEdit, arXiv 2411.15432. There a trained network writes the experts and
trained extractors compare images and words; here an expert is fitted to its one request by
gradient, and the features are frozen (`editing.features`), so that nothing is trained beforehand.
The weights of the mixture are a softmax alone, without LiveEdit's sigmoid, which would take from
the expert of the very question that it was fitted to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from editing.edits import joined
from editing.features import Features, features_of
from editing.fingerprints import Fingerprint
from editing.fitting import Stopping, fit, says
from editing.inside import (
    Acting,
    InsideEdit,
    Passing,
    acting_in,
    asleep,
    fingerprint,
    language_site,
)
from editing.methods.growing import GrowingEditor
from editing.methods.memory import Memory, on
from editing.ranges import Certainty, Cosine, Count, NotNegative, Positive
from mmtune.batched import batched

if TYPE_CHECKING:
    from editing.edits import Edit
    from editing.mllm import MLLM
    from editing.requests import EditRequest

DEPTH = 0.68  # layer 21 of 32, the published place in LLaVA


@dataclass(frozen=True)
class LiveEditOptions:
    """Settings of LiveEdit.

    Attributes:
        layer: of the language model, counted from the input, negative from the end; None takes one
            at 68 % of its depth.
        rank: of an expert.
        image_above: cosine of two images' features from which they count as about the same. Where
            features tell things apart badly it must be near 1: an edit knows its own image then,
            and hardly another of the same thing.
        image_margin: experts whose images are further from the question's than the nearest one's,
            by more than this in cosine, are left out: what was asked about an image that was
            edited goes to the edits of that image, however many others are near it.
        words_above: the same of two questions' words, where the images are about the same.
        alone_above: the same for an edit without an image, which nothing else keeps to itself.
        temperature: of the softmax over the cosines of words; small ones let the nearest win.
        experts: mixed for one question at most.
        steps: of Adam at most.
        lr: Adam's.
        certainty: probability that each token of the target must reach, besides being likeliest.
        batch_size: requests computed at once.
        seed: of what is drawn where no generator is given.
    """

    layer: int | None = None
    rank: Count = 4
    image_above: Cosine = 0.99
    image_margin: NotNegative = 0.005
    words_above: Cosine = 0.8
    alone_above: Cosine = 0.98
    temperature: Positive = 0.02
    experts: Count = 4
    steps: Count = 50
    lr: Positive = 1e-2
    certainty: Certainty = 0.9
    batch_size: Count = 16
    seed: int = 0


@dataclass(frozen=True)
class Fact:
    """What an expert is asked."""

    question: str


@dataclass(frozen=True)
class Router:
    """Which experts a question goes to; see `LiveEditOptions`."""

    image_above: float
    words_above: float
    alone_above: float
    temperature: float
    experts: int
    image_margin: float = 2.0  # of all cosines; edits that were saved before it have none

    def mixture(self, asked: Features, stored: Features) -> tuple[Tensor, Tensor]:
        """The experts of k questions among n.

        Returns:
            [k, m] their numbers and [k, m] their weights: those of a question sum to 1, or are 0
            where no expert is about it.
        """
        words = _cosines(asked.words, stored.words)
        images = _cosines(asked.image, stored.image)
        # Questions without words (captions) are alike.
        words = torch.where((asked.words == 0).all(1)[:, None], _no_words(stored), words)
        about = asked.seen[:, None] & (images >= self.image_above) & (words >= self.words_above)
        nearest = images.masked_fill(~about, -torch.inf).amax(1, keepdim=True)
        about &= images >= nearest - self.image_margin
        fits = torch.where(stored.seen, about, words >= self.alone_above)
        found = words.masked_fill(~fits, -torch.inf).topk(min(self.experts, words.shape[1]))
        weights = (found.values / self.temperature).softmax(1).nan_to_num(0.0)
        return found.indices, weights


@dataclass(frozen=True)
class Experts:
    """n experts: U [n, r, d] and V [n, r, d]."""

    up: Tensor
    down: Tensor

    def added(self, h: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """[k, s, d] in float32 at least: what m experts [k, m] add to hidden states [k, s, d]."""
        exact = h.to(torch.promote_types(h.dtype, self.up.dtype))
        x = nn.functional.layer_norm(exact, exact.shape[-1:])
        up, down = self.up[index], self.down[index]
        active = torch.einsum("ksd,kmrd->ksmr", x, up).relu()
        return torch.einsum("ksmr,km,kmrd->ksd", active, weights.to(x), down)

    def rows(self, rows: Sequence[int]) -> Experts:
        """Some of them."""
        return Experts(self.up[list(rows)], self.down[list(rows)])

    def then(self, later: Experts) -> Experts:
        """These and others."""
        return Experts(torch.cat([self.up, later.up]), torch.cat([self.down, later.down]))


class _Acting(Acting):
    """Routes by features; hidden states of questions out of scope pass untouched."""

    def __init__(self, mllm: MLLM, experts: Experts, stored: Features, router: Router) -> None:
        self.mllm, self.experts, self.stored, self.router = mllm, experts, stored, router

    def decide(self, passing: Passing) -> None:
        if not len(self.stored.words):
            return
        with asleep(self.mllm):
            asked = features_of(self.mllm, passing.batch.probes)
        index, weights = self.router.mixture(asked, self.stored)
        if weights.any():
            passing.route = index, weights

    def output(self, passing: Passing, x: Tensor, y: Tensor) -> Tensor | None:
        if passing.route is None:
            return None
        index, weights = passing.route
        new = (y + self.experts.added(y, index, weights)).to(y.dtype)
        return torch.where(weights.any(1)[:, None, None], new, y)


class _Fitting(Acting):
    """Each question of a batch goes to the expert of its row, alone."""

    def __init__(self, experts: Experts) -> None:
        self.experts = experts

    def output(self, passing: Passing, x: Tensor, y: Tensor) -> Tensor:
        own = passing.rows[:, None]
        return (y + self.experts.added(y, own, torch.ones_like(own))).to(y.dtype)


class LiveEdit(InsideEdit):
    """Experts, and what they are about.

    Attributes:
        experts: on the CPU.
        memory: what each is asked.
        router: which of them a question goes to.
    """

    kind: ClassVar[str] = "liveedit"

    def __init__(
        self,
        path: str,
        experts: Experts,
        memory: Memory[Fact],
        router: Router,
        made_on: Fingerprint,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(path, made_on, about)
        self.experts, self.memory, self.router = experts, memory, router

    def acting(self, mllm: MLLM) -> Acting:
        width = mllm.backbone.select(["language"], ["layer"])[0].width
        self.fits(mllm, "hidden states", self.experts.up.shape[2], width)
        experts = Experts(self.experts.up.to(mllm.device), self.experts.down.to(mllm.device))
        return _Acting(mllm, experts, on(self.memory.features, mllm.device), self.router)

    def joins(self, later: Edit) -> bool:
        return (
            super().joins(later)
            and isinstance(later, LiveEdit)
            and later.router == self.router
            and later.experts.up.shape[1:] == self.experts.up.shape[1:]
        )

    def then(self, later: Edit) -> Edit:
        """The experts of both; of two that are asked the same, the later one."""
        if not self.joins(later) or not isinstance(later, LiveEdit):
            return super().then(later)
        new = range(len(later.memory.facts))
        rows = [
            i
            for i in range(len(self.memory.facts))
            if not self.memory.repeated(i, later.memory, new)
        ]
        return LiveEdit(
            self.path,
            self.experts.rows(rows).then(later.experts),
            self.memory.rows(rows).then(later.memory),
            self.router,
            self.made_on,
            joined(self.about, later.about),
        )

    def settings(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "router": vars(self.router),
            "questions": [fact.question for fact in self.memory.facts],
            "made_on": self.made_on.json(),
        }

    def tensors(self) -> dict[str, Tensor]:
        return {"up": self.experts.up, "down": self.experts.down, **self.memory.tensors()}

    @classmethod
    def restored(
        cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], about: Mapping[str, Any]
    ) -> LiveEdit:
        facts = [Fact(str(question)) for question in settings["questions"]]
        experts = Experts(tensors["up"], tensors["down"])
        if not len(experts.up) == len(experts.down) == len(facts):
            raise ValueError("experts and questions are not equally many")
        memory, router = Memory.restored(facts, tensors), Router(**settings["router"])
        made_on = Fingerprint.read(settings["made_on"])
        return cls(str(settings["path"]), experts, memory, router, made_on, about)


class LiveEditor(GrowingEditor):
    """Fits one expert to each request.

        h <- h + sum_i w_i relu(norm(h) U_i^T) V_i,    w = softmax_i(cos(words, words_i) / T)

    with i over the experts that hard routing lets through.

    Numbers changed: none of the model's; an edit adds an expert of 2 r d.
    """

    name: ClassVar[str] = "liveedit"
    summary: ClassVar[str] = "a low-rank expert for each edit, found by its image and its words"
    source: ClassVar[str] = "LiveEdit, arXiv 2411.15432; experts fitted by gradient"
    options: ClassVar[type] = LiveEditOptions

    def empty(self, mllm: MLLM) -> LiveEdit:
        site = language_site(mllm, "layer", self.settings.layer, DEPTH)
        nothing = torch.zeros(0, self.settings.rank, site.width)
        features = Features(nothing[:, 0], nothing[:, 0], torch.zeros(0, dtype=torch.bool))
        s = self.settings
        router = Router(
            s.image_above, s.words_above, s.alone_above, s.temperature, s.experts, s.image_margin
        )
        made_on = fingerprint(mllm, _weight(mllm, site.path))
        experts = Experts(nothing, nothing)
        return LiveEdit(site.path, experts, Memory((), features), router, made_on)

    def grown(
        self,
        mllm: MLLM,
        edit: InsideEdit,
        requests: Sequence[EditRequest],
        generator: torch.Generator,
    ) -> LiveEdit:
        if not isinstance(edit, LiveEdit):
            raise TypeError(f"expected experts to go on from, got a {edit.kind} edit")
        with asleep(mllm):
            features = on(features_of(mllm, requests), torch.device("cpu"))
        every, n = Memory(tuple(Fact(r.question) for r in requests), features), len(requests)
        rows = [i for i in range(n) if not every.repeated(i, every, range(i + 1, n))]
        asked = [requests[i] for i in rows]
        experts, steps = self._fitted(mllm, edit, asked, generator)
        new = LiveEdit(edit.path, experts, every.rows(rows), edit.router, edit.made_on)
        made = edit.then(new)
        if not isinstance(made, LiveEdit):
            raise TypeError("experts of other settings cannot be joined")
        said = says(mllm, made, asked, self.settings.batch_size)
        made.about = {"steps": steps, "said": said, "experts": len(made.memory.facts)}
        return made

    def _fitted(
        self,
        mllm: MLLM,
        edit: LiveEdit,
        requests: Sequence[EditRequest],
        generator: torch.Generator,
    ) -> tuple[Experts, int]:
        """One expert for each request, on the CPU, and the most steps that one took.

        All begin with the same draw, so none depends on which were made together.
        """
        _, rank, width = edit.experts.up.shape
        drawn = (torch.randn(rank, width, generator=generator) / width**0.5).to(mllm.device)
        stopping, most, found = Stopping(self.settings.steps, self.settings.certainty), 0, []
        for part in batched(requests, self.settings.batch_size):
            up = drawn.expand(len(part), -1, -1).clone().requires_grad_()
            down = torch.zeros_like(up, requires_grad=True)
            batch = mllm.cached(mllm.batch(part), list(edit.made_on.weights))
            owner = torch.arange(len(part), device=mllm.device)
            with acting_in(mllm, edit.path, _Fitting(Experts(up, down))):
                fitted = fit(mllm, batch, [up, down], owner, self.settings.lr, stopping)
            found.append([tensor.cpu() for tensor in fitted.tensors])
            most = max(most, int(fitted.steps.max()))
        up, down = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Experts(up, down), most


def _cosines(queries: Tensor, stored: Tensor) -> Tensor:
    """[k, n]; 0 where one of the two is zero."""
    return nn.functional.normalize(queries, dim=1) @ nn.functional.normalize(stored, dim=1).T


def _no_words(stored: Features) -> Tensor:
    """[1, n] 1 for questions without words, else 0."""
    return (stored.words == 0).all(1)[None].to(stored.words)


def _weight(mllm: MLLM, path: str) -> str:
    """A matrix inside a layer, by which the layer is known: the last of its MLP."""
    sites = mllm.backbone.select(["language"], ["fc2"])
    return next(f"{s.path}.weight" for s in sites if s.path.startswith(f"{path}."))


EDITORS = (LiveEditor,)
