"""What a model is asked, as it reads it, and what an edit may put around its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from editing.requests import EditRequest, Probe

if TYPE_CHECKING:
    from editing.prefixes import Prefix
    from mmtune.backbones.generation import Decoding


@dataclass(frozen=True)
class Part:
    """Those probes of a batch that have an image, or those that have none.

    Attributes:
        rows: [k] their numbers in the batch.
        prompts: {input_ids [k, p], attention_mask [k, p]}, and image_sizes [k, 2] where the family
            reads images of several sizes.
        pixels: [k, 3, s, s], or what the family's processor gives, or None.
        images: [k] for each, the first of the k that shows the same image; None: all differ.
        prefix: what is computed once, see `MLLM.cached`.
    """

    rows: Tensor
    prompts: Mapping[str, Tensor]
    pixels: Tensor | None
    images: tuple[int, ...] | None = None
    prefix: Prefix | None = field(default=None, repr=False, compare=False)

    def chosen(self, picked: Sequence[int], rows: Sequence[int]) -> Part:
        """Some of the probes, by their place among the k, as `rows` of another batch."""
        index = torch.tensor(picked, device=self.rows.device)
        images = None
        if self.images is not None:
            own = [self.images[i] for i in picked]
            images = tuple(map(own.index, own))
        return Part(
            torch.tensor(rows, device=self.rows.device),
            {name: value[index] for name, value in self.prompts.items()},
            None if self.pixels is None else self.pixels[index],
            images,
        )


@dataclass(frozen=True)
class Batch:
    """n probes as a model reads them, on its device.

    Attributes:
        probes: what is asked.
        prefaces: the text that edits put in front of each question.
        parts: the prompts, with and without an image.
        target_ids: [n, t] tokens of the answers, an end token after each, padded on the right.
        target_mask: [n, t], 0 for padding.
        packs: whether prompts may be read together, see `packed`.
        prefix: what is computed once where all parts are computed together.
        packings: how they are, by what is computed, see `editing.packed`; found when needed.
    """

    probes: tuple[Probe, ...]
    prefaces: tuple[str, ...]
    parts: tuple[Part, ...]
    target_ids: Tensor
    target_mask: Tensor
    packs: bool = False
    prefix: Prefix | None = field(default=None, repr=False, compare=False)
    # Not taken over by `replace`: another batch is packed otherwise.
    packings: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.probes)

    @property
    def answer_mask(self) -> Tensor:
        """[n, t], 1 for the answers' own tokens, 0 for their end tokens and padding."""
        following = nn.functional.pad(self.target_mask[:, 1:], (0, 1))
        return self.target_mask * following

    def packed(self) -> Batch:
        """The same, where what several prompts begin with may be read once.

        The numbers are the same but for rounding, which then depends on what else is asked. Where
        something hooks a module, and in families that do not pack, prompts keep their rows.
        """
        return replace(self, packs=True)

    def in_rows(self) -> Batch:
        """The same, each prompt in a row of its own."""
        return replace(self, packs=False)

    def chosen(self, rows: Sequence[int]) -> Batch:
        """Some rows, at least one, in this order, padded as they are; nothing is computed yet."""
        parts = []
        for part in self.parts:
            own = part.rows.tolist()
            here = [number for number, row in enumerate(rows) if row in own]
            if here:
                parts.append(part.chosen([own.index(rows[number]) for number in here], here))
        index = torch.tensor(rows, device=self.target_ids.device)
        return replace(
            self,
            probes=tuple(self.probes[i] for i in rows),
            prefaces=tuple(self.prefaces[i] for i in rows),
            parts=tuple(parts),
            target_ids=self.target_ids[index],
            target_mask=self.target_mask[index],
            prefix=None,
        )


@dataclass(frozen=True)
class Sequences:
    """Whole sequences as a model reads them, image tokens and padding included.

    Attributes:
        logits: [n, s, v]; those at t predict token t + 1.
        labels: [n, s] ids of the answers' own tokens where they stand, else -100.
        mask: [n, s], 0 for padding.
    """

    logits: Tensor
    labels: Tensor
    mask: Tensor


class Interceptor:
    """What an edit may put around a model's answers; here it lets everything pass.

    `inner` is the model as it answers without this interceptor. With several, the one that was put
    there last is asked first.

    Attributes:
        apart: what is written may be something else than what scores highest.
    """

    apart: bool = False

    @property
    def answers(self) -> bool:
        """Whether it has a say in scores or in what is written, beyond what is read."""
        own = type(self)
        plain = Interceptor.logits, Interceptor.written
        return (own.logits, own.written) != plain

    @property
    def strays(self) -> bool:
        """Whether what is written may be something else than what scores highest."""
        own = type(self)
        scores = own.logits is not Interceptor.logits
        return self.apart or scores != (own.written is not Interceptor.written)

    def preface(self, probe: Probe) -> str:
        """Text to stand in front of the probe's question."""
        return ""

    def logits(self, batch: Batch, inner: Callable[[Batch], Tensor]) -> Tensor:
        """[n, t, v] scores of the answers' tokens, see `MLLM.answer_logits`."""
        return inner(batch)

    def written(
        self, batch: Batch, decoding: Decoding, inner: Callable[[Batch, Decoding], list[str]]
    ) -> list[str]:
        """An answer to each probe, see `MLLM.answer`."""
        return inner(batch, decoding)

    def sequences(self, batch: Batch, inner: Callable[[Batch], Sequences]) -> Sequences:
        """The scores of every token, see `MLLM.sequences`.

        Raises:
            TypeError: this changes how answers come about, and says nothing about other tokens.
        """
        if type(self).logits is not Interceptor.logits:
            raise TypeError("an applied edit changes answers only: there are no whole sequences")
        return inner(batch)


def probe_of(asked: Probe | EditRequest) -> Probe:
    """A request as the probe whose answer is its target. Raises ValueError: an empty target."""
    if isinstance(asked, Probe):
        return asked
    if not asked.target.strip():
        raise ValueError(
            f"the target of edit request {asked.id!r} ({asked.question!r:.80}) is empty; an edit "
            "needs an answer"
        )
    return Probe(asked.question, asked.target.strip(), asked.image)
