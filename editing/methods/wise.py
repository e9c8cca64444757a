"""WISE: a side copy of one MLP's value matrix holds the edits; a router says who goes through it.

A question goes to the side memory W' where |(W' - W) x|, averaged over its prompt, is above what
the edits reached; else it goes through W, and its answer is the base's to the bit. Edits of a shard
change the same random share of the matrix; shards are merged by TIES, or, between side memories,
the most active one is retrieved.

Source: Wang et al., WISE, arXiv 2405.14768. The released code routes anew at every token, averages
over the answer's tokens too (which tells it the answer) and compares activations behind another
non-linearity; here the prompt decides, once, by the paper's equation 2. Unrelated prompts are fixed
questions and those of records, where these are given. The replay of earlier edits is left out: a
shard that is filled edit by edit forgets, one edit a shard (`shard_size` 1) does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from editing.changes import added, exact_dtype
from editing.datasets import load_records
from editing.edits import joined
from editing.fingerprints import Fingerprint
from editing.fitting import says, target_losses
from editing.inside import Acting, InsideEdit, Passing, acting_in, fingerprint, language_site
from editing.methods.growing import GrowingEditor
from editing.methods.wise_memory import Margins, activations, margin_loss, mask_of, ties
from editing.ranges import Certainty, Count, Positive, Share
from editing.requests import Probe
from mmtune.batched import batched

if TYPE_CHECKING:
    from editing.edits import Edit
    from editing.mllm import MLLM
    from editing.requests import EditRequest

DEPTH = 0.88  # layer 27 of 32, the released place in Llama
UNRELATED = (
    "What is the capital of France?",
    "Who wrote Romeo and Juliet?",
    "How many legs does a spider have?",
    "What do bees make?",
    "What is in the background?",
    "Is it day or night?",
    "How many people are there?",
    "What colour is the largest object?",
)


@dataclass(frozen=True)
class WiseOptions:
    """Settings of WISE; the defaults are those released for Llama-2 7B.

    Attributes:
        layer: of the language model, counted from the input, negative from the end; None takes one
            at 88 % of its depth.
        memory: "retrieve" keeps one side memory for every `shards` shards, "merge" a single one.
        share: of the matrix that a shard may change.
        shard_size: edits in a shard.
        shards: that are merged into one side memory.
        density: share of a change's numbers that merging keeps.
        bound: no number of the matrix changes by more than this.
        alpha: activation that unrelated prompts may reach.
        beta: activation that edits are to reach.
        gamma: by how much edits are to be above unrelated prompts.
        ratio: share of the edits' least activation from which a question goes to the side memory.
        unrelated: questions that must not, asked alone, and about the images of the edits where
            there are no `records`.
        records: a .json file of edit records, others than those that will be edited, whose
            questions about their images must not go there either. Without, all that is known of
            other images is that other questions about the same image do not count: rephrases are
            kept out with them, and questions about other images get in.
        examples: how many of these records, the first ones, are read.
        optimiser: "sgd" as released, whose steps are as small as the model's gradients: small
            models hardly move in 70 of them. "adam" moves models of any size alike.
        steps: of it at most.
        lr: its learning rate; a hundredth for Adam.
        certainty: probability that each token of the target must reach, besides being likeliest.
        batch_size: requests computed at once.
        seed: of what is drawn where no generator is given.
    """

    layer: int | None = None
    memory: Literal["retrieve", "merge"] = "retrieve"
    share: Share = 0.2
    shard_size: Count = 500
    shards: Count = 2
    density: Share = 0.53
    bound: Positive = 1.0
    alpha: Positive = 5.0
    beta: Positive = 20.0
    gamma: Positive = 10.0
    ratio: Share = 0.88
    unrelated: tuple[str, ...] = UNRELATED
    records: str = ""
    examples: Count = 8
    optimiser: Literal["sgd", "adam"] = "sgd"
    steps: Count = 70
    lr: Positive = 1.0
    certainty: Certainty = 0.9
    batch_size: Count = 16
    seed: int = 0


@dataclass(frozen=True)
class Shard:
    """Edits that share a part of the matrix.

    Attributes:
        delta: [d, c] the change of the matrix, in float32 at least, on the CPU.
        seed: of its mask, see `mask_of`.
        count: edits in it.
        least: the least activation of its edits, each as it was when it was made.
    """

    delta: Tensor
    seed: int
    count: int
    least: float


@dataclass(frozen=True)
class Merging:
    """How shards become side memories; see `WiseOptions`."""

    memory: Literal["retrieve", "merge"]
    shards: int
    density: float
    ratio: float

    def memories(self, shards: Sequence[Shard]) -> list[tuple[Tensor, float]]:
        """(change, activation from which it counts) of each side memory.

        Shards that do not fill a side memory yet are side memories of their own.
        """
        if self.memory == "merge":
            groups = [shards] if shards else []
        else:
            whole = len(shards) - len(shards) % self.shards
            groups = [shards[i : i + self.shards] for i in range(0, whole, self.shards)]
            groups += [[shard] for shard in shards[whole:]]
        return [
            (ties([s.delta for s in group], self.density), self.ratio * min(s.least for s in group))
            for group in groups
        ]


class _Acting(Acting):
    """Routes whole questions by their prompts."""

    def __init__(self, linear: Any, memories: Sequence[tuple[Tensor, float]], causal: bool) -> None:
        weight, self.bias, self.causal = linear.weight.data, linear.bias, causal
        self.deltas = [delta.to(weight) for delta, _ in memories]
        self.sides = [added(weight, delta.to(weight.device)) for delta, _ in memories]
        self.least = [least for _, least in memories]

    def output(self, passing: Passing, x: Tensor, y: Tensor) -> Tensor | None:
        columns = passing.columns(x.shape[1])
        if passing.route is None:
            prompt, tokens = x[:, :columns], passing.tokens(columns, self.causal)
            active = [activations(prompt, delta, tokens) for delta in self.deltas]
            passing.route = self._route(active, len(x))
        new = None
        for number, side in enumerate(self.sides):
            rows = passing.route == number
            if rows.any():
                new = y.clone() if new is None else new
                new[rows] = nn.functional.linear(x[rows], side, self.bias)
        return new

    def _route(self, active: Sequence[Tensor], count: int) -> Tensor | list[int]:
        """[k] the number of the side memory that is most active of those that count, or -1."""
        if not active:
            return [-1] * count
        found = torch.stack(list(active))
        counts = found > found.new_tensor(self.least)[:, None]
        best = found.masked_fill(~counts, -1.0).argmax(0)
        return torch.where(counts.any(0), best, -1)


class _Reading(Acting):
    """Keeps the inputs of prompts, row by row."""

    def __init__(self, count: int, causal: bool) -> None:
        self.causal = causal
        self.found = [torch.empty(0)] * count

    def output(self, passing: Passing, x: Tensor, y: Tensor) -> None:
        columns = passing.columns(x.shape[1])
        tokens = passing.tokens(columns, self.causal)
        for row, own, mask in zip(passing.rows.tolist(), x, tokens, strict=True):
            self.found[row] = own[:columns][mask]


class WiseEdit(InsideEdit):
    """Side memories of one matrix.

    Attributes:
        shards: in order; the last may be open.
        merging: how they become side memories.
    """

    kind: ClassVar[str] = "wise"

    def __init__(
        self,
        path: str,
        shards: Sequence[Shard],
        merging: Merging,
        made_on: Fingerprint,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(path, made_on, about)
        self.shards, self.merging = tuple(shards), merging

    def acting(self, mllm: MLLM) -> Acting:
        linear = mllm.model.get_submodule(self.path)
        weight = mllm.model.get_parameter(f"{self.path}.weight")
        for shard in self.shards:
            self.fits(mllm, "an output", shard.delta.shape[0], weight.shape[0])
            self.fits(mllm, "an input", shard.delta.shape[1], weight.shape[1])
        return _Acting(linear, self.merging.memories(self.shards), _causal(mllm))

    def joins(self, later: Edit) -> bool:
        return (
            super().joins(later) and isinstance(later, WiseEdit) and later.merging == self.merging
        )

    def then(self, later: Edit) -> Edit:
        """The shards of both; those of `later` stay apart until they are merged."""
        if not self.joins(later) or not isinstance(later, WiseEdit):
            return super().then(later)
        shards, about = (*self.shards, *later.shards), joined(self.about, later.about)
        return WiseEdit(self.path, shards, self.merging, self.made_on, about)

    def settings(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "merging": asdict(self.merging),
            "shards": [{"seed": s.seed, "count": s.count, "least": s.least} for s in self.shards],
            "made_on": self.made_on.json(),
        }

    def tensors(self) -> dict[str, Tensor]:
        return {f"shard/{i}": shard.delta for i, shard in enumerate(self.shards)}

    @classmethod
    def restored(
        cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], about: Mapping[str, Any]
    ) -> WiseEdit:
        shards = [
            Shard(tensors[f"shard/{i}"], int(s["seed"]), int(s["count"]), float(s["least"]))
            for i, s in enumerate(settings["shards"])
        ]
        merging, made_on = Merging(**settings["merging"]), Fingerprint.read(settings["made_on"])
        return cls(str(settings["path"]), shards, merging, made_on, about)


class Wise(GrowingEditor):
    """Edits a side memory, shard by shard, and learns when it is to be taken.

        y = W' x    where the mean of |(W' - W) x| over the prompt > ratio * (the edits' least)
            W x     elsewhere

    Numbers changed: none of the model's; a shard changes share * d_in * d_out of its side copy.
    """

    name: ClassVar[str] = "wise"
    summary: ClassVar[str] = "a side copy of one MLP matrix, taken where it is active"
    source: ClassVar[str] = "WISE, arXiv 2405.14768"
    options: ClassVar[type] = WiseOptions

    def empty(self, mllm: MLLM) -> WiseEdit:
        s = self.settings
        site = language_site(mllm, "fc2", s.layer, DEPTH)
        merging = Merging(s.memory, s.shards, s.density, s.ratio)
        return WiseEdit(site.path, (), merging, fingerprint(mllm, f"{site.path}.weight"))

    def grown(
        self,
        mllm: MLLM,
        edit: InsideEdit,
        requests: Sequence[EditRequest],
        generator: torch.Generator,
    ) -> WiseEdit:
        if not isinstance(edit, WiseEdit):
            raise TypeError(f"expected side memories to go on from, got a {edit.kind} edit")
        shards, left, notes = list(edit.shards), list(requests), {}
        weight = mllm.model.get_parameter(f"{edit.path}.weight")
        while left:
            if not shards or shards[-1].count >= self.settings.shard_size:
                seed = int(torch.randint(2**31, (), generator=generator))
                delta = torch.zeros_like(weight, dtype=exact_dtype(weight), device="cpu")
                shards.append(Shard(delta, seed, 0, float("inf")))
            room = self.settings.shard_size - shards[-1].count
            shards[-1], notes = self._filled(mllm, edit.path, shards[-1], left[:room])
            left = left[room:]
        made = WiseEdit(edit.path, shards, edit.merging, edit.made_on)
        said = says(mllm, made, requests, self.settings.batch_size)
        made.about = {**notes, "said": said, "shards": len(shards)}
        return made

    def _filled(
        self, mllm: MLLM, path: str, shard: Shard, requests: Sequence[EditRequest]
    ) -> tuple[Shard, dict[str, Any]]:
        """A shard with more edits, all of them fitted together; and how it went."""
        s, name = self.settings, f"{path}.weight"
        weight = mllm.model.get_parameter(name).detach()
        mask = mask_of(weight.shape, s.share, shard.seed).to(weight.device)
        leaf = shard.delta.to(weight.device, copy=True).requires_grad_()
        unrelated = self._prompts(mllm, path, self._unrelated(requests))
        parts = []
        for part in batched(requests, s.batch_size):
            prompts = self._prompts(mllm, path, [Probe(r.question, "", r.image) for r in part])
            parts.append((mllm.cached(mllm.batch(part), [name]), prompts))
        kind = torch.optim.Adam if s.optimiser == "adam" else torch.optim.SGD
        optimiser, step = kind([leaf], lr=s.lr), 0
        while True:
            loss, done = 0.0, True
            for batch, prompts in parts:
                with torch.enable_grad():
                    delta = leaf * mask
                    losses, sure = target_losses(
                        mllm, batch, s.certainty, {name: added(weight, delta)}
                    )
                    edited, other = _active(prompts, delta), _active(unrelated, delta)
                    lacks = margin_loss(edited, other, Margins(s.alpha, s.beta, s.gamma))
                    share = len(batch) / len(requests)
                    (share * (losses.mean() + lacks)).backward()
                loss += share * float(losses.detach().mean())
                done = done and bool(sure.all()) and not float(lacks.detach())
            if done or step == s.steps:
                break
            optimiser.step()
            optimiser.zero_grad()
            with torch.no_grad():
                leaf.clamp_(-s.bound, s.bound)
            step += 1
        delta = (leaf * mask).detach()
        least = min(float(_active(prompts, delta).min()) for _, prompts in parts)
        most = float(_active(unrelated, delta).max())
        count = shard.count + len(requests)
        filled = Shard(delta.cpu(), shard.seed, count, min(shard.least, least))
        return filled, {"steps": step, "loss": loss, "least": least, "unrelated": most}

    def _unrelated(self, requests: Sequence[EditRequest]) -> list[Probe]:
        """The unrelated questions, alone and about images."""
        chosen = self.settings
        bare = [Probe(question, "") for question in chosen.unrelated]
        if chosen.records:
            found = load_records(chosen.records, limit=chosen.examples, progress=False).records
            return bare + [Probe(r.request.question, "", r.request.image) for r in found]
        images = [r.image for r in requests if r.image is not None]
        shown = zip(chosen.unrelated, images * len(bare), strict=False)
        return bare + [Probe(question, "", image) for question, image in shown]

    @torch.no_grad()
    def _prompts(self, mllm: MLLM, path: str, probes: Sequence[Probe]) -> list[Tensor]:
        """[p, c] inputs of the matrix at each prompt's tokens; the model is shown no answer."""
        found = []
        for part in batched(probes, self.settings.batch_size):
            reading = _Reading(len(part), _causal(mllm))
            with acting_in(mllm, path, reading):
                mllm.answer_logits(mllm.batch(part))
            found += reading.found
        return found


def _active(prompts: Sequence[Tensor], delta: Tensor) -> Tensor:
    """[n] activations of prompts of different lengths."""
    x = nn.utils.rnn.pad_sequence([p.to(delta) for p in prompts], batch_first=True)
    lengths = torch.tensor([len(p) for p in prompts], device=x.device)
    tokens = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return activations(x, delta, tokens)


def _causal(mllm: MLLM) -> bool:
    return mllm.backbone.trunks()["language"].causal


EDITORS = (Wise,)
