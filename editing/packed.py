"""The prompts of a batch in one pass, packed, where that makes it shorter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from editing.prefix_layouts import hooked_among
from editing.prefixes import passing
from mmtune.backbones import packing
from mmtune.backbones.packing import Packing, Prompt

if TYPE_CHECKING:
    from torch import Tensor, nn

    from editing.batches import Batch, Part
    from mmtune.backbones.generation import Decoding
    from mmtune.backbones.generative import Generative

# Of the cost of rows of their own, at most: where these take one pass, and where they take two. A
# packed pass is also gone on with where answers are written; then no prompt is read again.
ONE, TWO = 0.75, 1.25
Read = Callable[["Part", "Tensor | None"], dict[str, "Tensor"]]


@dataclass(frozen=True)
class Passed:
    """A pass over packed prompts.

    Attributes:
        scores: [n, t, v] of each target token; of the first alone where no target was read.
        packing: how they were packed.
        cache: keys and values, where they were kept.
        model: that computed them.
        backbone: its view.
    """

    scores: Tensor
    packing: Packing
    cache: Any
    model: nn.Module
    backbone: Generative

    def written(self, decoding: Decoding, known: Tensor | None = None) -> Tensor:
        """[n, m] what the model goes on with behind the prompts; targets are not looked at.

        Args:
            decoding: see `Packer.prompted`.
            known: [n] bool, of which prompts that is not wanted.
        """
        ends, pad = self.backbone.ends, self.backbone.pad
        first = self.scores[:, 0]
        return packing.written(
            self.model, self.packing, self.cache, first, decoding, ends, pad, known
        )


class Packer:
    """Passes over packed prompts, of a model whose backbone has them packed.

    Where anything hooks a module there are none: what hooks looks for rows as they were asked.

    Args:
        model: the stock model.
        backbone: its view.
    """

    def __init__(self, model: nn.Module, backbone: Generative) -> None:
        self._model, self._backbone = model, backbone
        self._modules = list(model.modules())

    @property
    def hooked(self) -> bool:
        """Whether anything hooks a module."""
        return bool(hooked_among(self._modules))

    def scored(self, batch: Batch, read: Read, writing: bool = False) -> Passed | None:
        """A pass over prompts and targets; None where rows of their own are as good.

        Args:
            batch: what is read.
            read: gives the context of a part.
            writing: whether answers are written afterwards.
        """
        return self._passed(batch, read, scored=True, writing=writing)

    def prompted(self, batch: Batch, read: Read, decoding: Decoding) -> Passed | None:
        """A pass over prompts, to be followed by this decoding; None where there is none."""
        simple = decoding.beams == 1 and decoding.min_tokens == 0 and decoding.cache
        return self._passed(batch, read, scored=False, writing=True) if simple else None

    def _passed(self, batch: Batch, read: Read, scored: bool, writing: bool) -> Passed | None:
        own = self._packing(batch, scored)
        if own is None or (writing and not self._backbone.packs_writing):
            return None
        cache = None
        if writing:
            from transformers import DynamicCache

            cache = DynamicCache()
        ids, mask = (batch.target_ids, batch.target_mask) if scored else (None, None)
        targets = () if ids is None or mask is None else (ids, mask)
        kind = f"packed, scored: {scored}, writing: {writing}"
        with passing(batch.prefix, kind, batch.parts, targets):
            contexts = [read(part, mask) for part in batch.parts]
            scores = packing.scored(self._model, own, contexts, ids, cache)
        return Passed(scores, own, cache, self._model, self._backbone)

    def _packing(self, batch: Batch, scored: bool) -> Packing | None:
        placeholder = self._backbone.packs
        if placeholder is None or not batch.packs:
            return None
        if scored not in batch.packings:
            config: Any = self._model.config
            width = config.text_config.hidden_size
            batch.packings[scored] = _packed(batch, placeholder, width, scored)
        found = batch.packings[scored]
        return None if found is None or self.hooked else found


def _packed(batch: Batch, placeholder: int, width: int, scored: bool) -> Packing | None:
    """Where prompts stand; None where rows of their own are as good.

    Args:
        batch: of a model that reads prompts token by token, padded on the left.
        placeholder: id of an image's tokens.
        width: of the language model.
        scored: whether the targets are read behind the prompts.
    """
    found = _prompts(batch, placeholder, scored)
    plan = packing.planned(found, width)
    targets = batch.target_ids.shape[1] if scored else 1
    plain = sum(
        packing.cost_of(len(ids), ids.shape[1] + targets - 1, width)
        for ids in (part.prompts["input_ids"] for part in batch.parts)
    )
    if plan.cost > plain * (TWO if len(batch.parts) > 1 else ONE):
        return None
    return packing.packing(found, plan, targets, batch.target_ids.device)


def _prompts(batch: Batch, placeholder: int, scored: bool) -> list[Prompt]:
    """The prompts in order."""
    behind = batch.target_ids.shape[1] - 1 if scored else 0
    counts = [min(n - 1, behind) for n in batch.target_mask.sum(1).tolist()]
    start = sum(part.prompts["input_ids"].numel() for part in batch.parts)
    found: dict[int, Prompt] = {}
    first = 0
    for part in batch.parts:
        masks = part.prompts["attention_mask"].sum(1).tolist()
        for number, row in enumerate(part.rows.tolist()):
            ids = part.prompts["input_ids"][number].tolist()
            own = ids[len(ids) - masks[number] :]
            after = own[::-1]
            found[row] = Prompt(
                own,
                first + len(ids) - len(own),
                None if part.images is None else part.images[number],
                len(own) - after.index(placeholder) if placeholder in after else 0,
                (start + row * behind, counts[row]),
            )
            first += len(ids)
    return [found[row] for row in range(len(batch))]
