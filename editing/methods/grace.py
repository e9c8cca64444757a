"""GRACE: a codebook at one layer; a question near a stored key gets the stored state instead.

A key is what the layer is given at a question's last prompt token, where its answer begins, and
never depends on an answer. A value is the layer's output that makes the model write the target,
found by gradient.

Source: Hartvigsen et al., Aging with GRACE, arXiv 2211.11031. The released code replaces the
prompt up to, without, its last token, starts at random values, tells labels apart by the mean of
their token ids, decides anew at every token that is written, and lets radii that are split grow to
half of the distance; here each question is decided about once, and no radius grows by a split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from editing.edits import joined
from editing.fingerprints import Fingerprint
from editing.fitting import Stopping, fit, says
from editing.inside import Acting, InsideEdit, Passing, acting_in, fingerprint, language_site
from editing.methods.grace_codebook import Codebook
from editing.methods.growing import GrowingEditor
from editing.ranges import Certainty, Count, Positive
from editing.regions import RegionName
from editing.requests import Probe
from mmtune.backbones.base import SiteError
from mmtune.batched import batched

if TYPE_CHECKING:
    from editing.edits import Edit
    from editing.mllm import MLLM
    from editing.requests import EditRequest

Replacement = Literal["onward", "last", "prompt", "all"]
DEPTH = 0.88  # layer 27 of 32, the released place in Llama
SAME = 1e-5  # relative distance of two computations of one key in float32


@dataclass(frozen=True)
class GraceOptions:
    """Settings of GRACE.

    Attributes:
        region: "language" acts at an MLP's output; "vision" at the projector's, where the key is
            the mean over the image's tokens: it knows the image alone, and changes every answer
            about it.
        layer: of the language model, counted from the input, negative from the end; None takes one
            at 88 % of its depth. With `last`, targets of several tokens need layers above it.
        radius: of a new key, in the units of the layer's input.
        replacement: whose states are replaced: the last prompt token's (of an image: its last
            token's), the whole prompt's, or those of the answer too.
        start: of a new value: what the layer gives there, or numbers drawn from [0, 1).
        steps: of Adam at most.
        lr: Adam's.
        certainty: probability that each token of the target must reach, besides being likeliest.
        batch_size: requests computed at once.
        seed: of what is drawn where no generator is given.
    """

    region: RegionName = "language"
    layer: int | None = None
    radius: Positive = 1.0
    replacement: Replacement = "last"
    start: Literal["warm", "cold"] = "warm"
    steps: Count = 100
    lr: Positive = 1.0
    certainty: Certainty = 0.9
    batch_size: Count = 16
    seed: int = 0


@dataclass(frozen=True)
class Place:
    """Where and how values are put in place.

    Attributes:
        path: of the module.
        region: what passes there: an image's tokens, or those of prompts and answers.
        replacement: see `GraceOptions`.
    """

    path: str
    region: RegionName
    replacement: Replacement

    def query(self, x: Tensor, columns: int) -> Tensor:
        """[k, c] what the keys are compared with, from the module's input [k, s, c]."""
        return x.float().mean(1) if self.region == "vision" else x[:, columns - 1].float()

    def replaced(self, length: int, columns: int, device: torch.device) -> Tensor:
        """[s] bool, whether the state of a token that passes now is replaced."""
        at = torch.arange(length, device=device)
        if self.replacement == "all" or (self.region == "vision" and self.replacement == "prompt"):
            return at >= 0
        end = length if self.region == "vision" else columns
        if self.replacement == "onward":
            return at >= end - 1
        return at == end - 1 if self.replacement == "last" else at < end


class _Acting(Acting):
    """Takes values from a codebook."""

    def __init__(self, place: Place, book: Codebook) -> None:
        self.place, self.book = place, book

    def output(self, passing: Passing, x: Tensor, y: Tensor) -> Tensor | None:
        columns = passing.columns(x.shape[1])
        if passing.route is None:
            passing.route = self.values(passing, self.place.query(x, columns))
        values, inside = passing.route
        here = inside[:, None] & self.place.replaced(x.shape[1], columns, x.device)
        if not here.any():
            return None
        return torch.where(here[..., None], values[:, None].to(y), y)

    def values(self, passing: Passing, queries: Tensor) -> tuple[Tensor, Tensor]:
        """[k, d] values and [k] bool, whether they count, for queries [k, c]."""
        if not len(self.book):
            return queries[:, :1], torch.zeros_like(queries[:, 0], dtype=torch.bool)
        near = self.book.nearest(queries)
        return self.book.values[near.index], near.inside


class _Fitting(_Acting):
    """Gives each question of a batch [n] its own value, whatever its key."""

    def __init__(self, place: Place, book: Codebook, fitted: Tensor, owner: Tensor) -> None:
        super().__init__(place, book)
        self.fitted, self.owner = fitted, owner

    def values(self, passing: Passing, queries: Tensor) -> tuple[Tensor, Tensor]:
        places = passing.places(len(queries))
        # Questions about one image have one key, so one entry: the first stands for all.
        asking = passing.rows[[places.index(row) for row in range(len(queries))]]
        own = self.fitted[self.owner[asking]]
        return own, torch.ones(len(own), dtype=torch.bool, device=own.device)


class _Reading(Acting):
    """Keeps what the module is given, and what it gives, where a key is taken."""

    def __init__(self, place: Place, count: int) -> None:
        self.place = place
        self.found: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * count

    def output(self, passing: Passing, x: Tensor, y: Tensor) -> None:
        columns = passing.columns(x.shape[1])
        keys, own = self.place.query(x, columns), self.place.query(y, columns)
        for row, place in zip(passing.rows.tolist(), passing.places(len(x)), strict=True):
            self.found[row] = keys[place], own[place]


class GraceEdit(InsideEdit):
    """A codebook in its place.

    Attributes:
        book: on the CPU.
        place: where it acts.
    """

    kind: ClassVar[str] = "grace"

    def __init__(
        self,
        place: Place,
        book: Codebook,
        made_on: Fingerprint,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(place.path, made_on, about)
        self.place, self.book = place, book.to("cpu")

    def acting(self, mllm: MLLM) -> Acting:
        outputs, inputs = mllm.model.get_parameter(f"{self.path}.weight").shape
        self.fits(mllm, "an input", self.book.keys.shape[1], inputs)
        self.fits(mllm, "an output", self.book.values.shape[1], outputs)
        return _Acting(self.place, self.book.to(mllm.device))

    def joins(self, later: Edit) -> bool:
        return super().joins(later) and isinstance(later, GraceEdit) and later.place == self.place

    def then(self, later: Edit) -> Edit:
        """One codebook of both; see `Codebook.joined`."""
        if not self.joins(later) or not isinstance(later, GraceEdit):
            return super().then(later)
        book = self.book.joined(later.book, self.accuracy)
        return GraceEdit(self.place, book, self.made_on, joined(self.about, later.about))

    @property
    def accuracy(self) -> float:
        """How far apart two computations of one key may be, relative to its norm."""
        dtypes = [getattr(torch, weight.dtype) for weight in self.made_on.weights.values()]
        return max(SAME, *(2 * torch.finfo(dtype).eps for dtype in dtypes))

    def settings(self) -> dict[str, Any]:
        head = {"labels": list(self.book.labels), "made_on": self.made_on.json()}
        return {**asdict(self.place), **head}

    def tensors(self) -> dict[str, Tensor]:
        return {"keys": self.book.keys, "values": self.book.values, "radii": self.book.radii}

    @classmethod
    def restored(
        cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], about: Mapping[str, Any]
    ) -> GraceEdit:
        keys, values, radii = (tensors[name] for name in ("keys", "values", "radii"))
        labels = tuple(map(str, settings["labels"]))
        if not len(keys) == len(values) == len(radii) == len(labels):
            raise ValueError("keys, values, radii and labels are not equally many")
        place = Place(settings["path"], settings["region"], settings["replacement"])
        made_on = Fingerprint.read(settings["made_on"])
        return cls(place, Codebook(keys, values, radii, labels), made_on, about)


class Grace(GrowingEditor):
    """Adds an edit to a codebook, by its rules, and fits the edit's value.

        h(x) = value_i    where |q(x) - key_i| <= radius_i, i the nearest key to the query q(x)
               layer(x)   elsewhere

    Numbers changed: none of the model's; an edit adds a key [c], a value [d] and a radius at most.
    """

    name: ClassVar[str] = "grace"
    summary: ClassVar[str] = "a codebook at one layer: near a stored key, the stored state counts"
    source: ClassVar[str] = "GRACE, arXiv 2211.11031"
    options: ClassVar[type] = GraceOptions

    def empty(self, mllm: MLLM) -> GraceEdit:
        if self.settings.region == "vision":
            if getattr(mllm.backbone, "reads_sizes", False):
                raise SiteError(
                    f"{mllm.name} reads images in pieces, of which its projector does not know to "
                    "which image they belong, so none can be a key there: use region: language"
                )
            site = mllm.backbone.select(["projector"], ["head"])[-1]
        else:
            site = language_site(mllm, "fc2", self.settings.layer, DEPTH)
        place = Place(site.path, self.settings.region, self.settings.replacement)
        outputs, inputs = mllm.model.get_parameter(f"{place.path}.weight").shape
        made_on = fingerprint(mllm, f"{place.path}.weight")
        return GraceEdit(place, Codebook.empty(inputs, outputs), made_on)

    def grown(
        self,
        mllm: MLLM,
        edit: InsideEdit,
        requests: Sequence[EditRequest],
        generator: torch.Generator,
    ) -> GraceEdit:
        if not isinstance(edit, GraceEdit):
            raise TypeError(f"expected a codebook to go on from, got a {edit.kind} edit")
        if edit.place.region == "vision" and any(r.image is None for r in requests):
            raise ValueError("a vision edit is found by its image: every request must have one")
        book, groups = edit.book.to(mllm.device), {}
        keys, starts = self._read(mllm, edit.place, requests)
        if self.settings.start == "cold":
            starts = torch.rand(starts.shape, generator=generator).to(starts)
        for request, key, start in zip(requests, keys, starts, strict=True):
            book, entry = book.placed(
                key, start, request.target.strip(), self.settings.radius, edit.accuracy
            )
            groups.setdefault(entry, []).append(request)
        # Of two requests with one key and different targets, the later counts.
        groups = {
            entry: [r for r in asked if r.target.strip() == book.labels[entry]]
            for entry, asked in groups.items()
        }
        book, steps = self._fitted(mllm, edit.place, book, groups)
        made = GraceEdit(edit.place, book, edit.made_on)
        asked = [request for group in groups.values() for request in group]
        said = says(mllm, made, asked, self.settings.batch_size)
        made.about = {"steps": steps, "said": said, "entries": len(book)}
        return made

    @torch.no_grad()
    def _read(
        self, mllm: MLLM, place: Place, requests: Sequence[EditRequest]
    ) -> tuple[Tensor, Tensor]:
        """[n, c] keys and [n, d] what the layer gives there; the model is shown no target."""
        found = []
        for part in batched(requests, self.settings.batch_size):
            reading = _Reading(place, len(part))
            with acting_in(mllm, place.path, reading):
                mllm.answer_logits(mllm.batch([Probe(r.question, "", r.image) for r in part]))
            found += reading.found
        keys, own = zip(*found, strict=True)
        return torch.stack(keys), torch.stack(own)

    def _fitted(
        self,
        mllm: MLLM,
        place: Place,
        book: Codebook,
        groups: Mapping[int, Sequence[EditRequest]],
    ) -> tuple[Codebook, int]:
        """The codebook with the values of these entries fitted, and the most steps one took.

        An entry to which several requests came is fitted to all of them.
        """
        stopping, most = Stopping(self.settings.steps, self.settings.certainty), 0
        for entries in batched(groups, self.settings.batch_size):
            owner = [i for i, entry in enumerate(entries) for _ in groups[entry]]
            owner = torch.tensor(owner, device=mllm.device)
            values = book.values[list(entries)].requires_grad_()
            batch = mllm.batch([r for entry in entries for r in groups[entry]])
            batch = mllm.cached(batch, [f"{place.path}.weight"])
            with acting_in(mllm, place.path, _Fitting(place, book, values, owner)):
                fitted = fit(mllm, batch, [values], owner, self.settings.lr, stopping)
            book = book.with_values(entries, fitted.tensors[0])
            most = max(most, int(fitted.steps.max()))
        return book, most


EDITORS = (Grace,)
