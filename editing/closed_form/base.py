"""What the closed-form editors are: their settings, their layers, and the contexts they read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from editing.closed_form.places import Place, stack_of
from editing.closed_form.texts import STARTS, CovarianceOptions, sampled
from editing.closed_form.values import ValueOptions
from editing.edits import set_aside
from editing.methods.base import Editor
from editing.regions import Region, RegionName, parameters_of
from mmtune.backbones.base import Site, SiteError

if TYPE_CHECKING:
    from torch import nn

    from editing.mllm import MLLM

SPREAD = 5  # layers that MEMIT and AlphaEdit change, as published for GPT-J and Llama


@dataclass(frozen=True)
class ClosedFormOptions:
    """Settings of every closed-form editor.

    Attributes:
        region: "language"; there is no other in which a question has a key.
        place: the token whose key is looked up. "prompt": the last one before the answer, where
            question and image have come together; right where the image says what is asked about.
            "question": the question's last. "subject": the last of `EditRequest.subject`, as
            published for questions about things that have names. An encoder-decoder reads question
            and subject in its encoder, and "prompt" is its decoder's first token.
        prefixes: texts of the model's own behind which each question is read as well, so that its
            key is the mean over contexts; a request without a question has none.
        prefix_tokens: of each such text.
        value: the search for values.
        covariance: the keys that are to be left alone.
        seed: of what is drawn where no generator is given.
    """

    region: RegionName = "language"
    place: Place = "prompt"
    prefixes: Annotated[int, Field(ge=0)] = 5
    prefix_tokens: Annotated[int, Field(ge=1)] = 10
    value: ValueOptions = field(default_factory=ValueOptions)
    covariance: CovarianceOptions = field(default_factory=CovarianceOptions)
    seed: int = 0


class ClosedForm(Editor):
    """Editors that write keys and values into the weights of fc2 by a formula."""

    def places(
        self, mllm: MLLM, layers: str | Sequence[int] | None, count: int
    ) -> dict[str, tuple[Site, nn.Parameter]]:
        """The weights to change by name, with their sites, in forward order.

        Args:
            mllm: the model.
            layers: of the language branch; None takes `count` layers, the last of them a quarter up
                the stack for places inside the question (published: layer 8 of 32) and two thirds
                up for "prompt", to which what is asked comes only in the upper layers. It is never
                the top layer, from which later tokens of the answer see nothing.
            count: how many where `layers` is None.

        Raises:
            SiteError: a vision region; layers that are not there, are quantised, or do not read the
                place.
        """
        name, place = self.name, self.settings.place
        if self.settings.region != "language":
            raise SiteError(
                f"{name} edits the language region, where a question's key is looked up at one of "
                f'its tokens; got region {self.settings.region!r}. Use region: language, or "ft", '
                '"lora" or "mend" for vision'
            )
        view = mllm.backbone
        sites = view.select(["language"], ["fc2"], "all" if layers is None else layers)
        wanted = "decoder" if place == "prompt" else "encoder"
        if layers is None:
            stacks = [s for s in sites if stack_of(view, s) in ("decoder-only", wanted)]
            depth = len(stacks)
            last = max(min(depth // 4 if place != "prompt" else 2 * depth // 3, depth - 2), 0)
            sites = stacks[max(last + 1 - count, 0) : last + 1]
        kinds = {stack_of(view, s) for s in sites}
        if len(kinds) > 1 or ("decoder" in kinds and place != "prompt"):
            raise SiteError(
                f"layers {[s.layer for s in sites]} are in the {' and the '.join(sorted(kinds))}, "
                f'and place "{place}" is one token of one stack: choose layers of the {wanted}'
            )
        numbers = tuple(s.layer for s in sites if s.layer is not None)
        weights = parameters_of(view, Region(("language",), ("fc2",), numbers))
        return {f"{s.path}.weight": (s, weights[f"{s.path}.weight"]) for s in sites}

    def prefixes(self, mllm: MLLM, generator: torch.Generator) -> list[str]:
        """Texts to read questions behind, written by the unedited model."""
        count = self.settings.prefixes
        if not count or "text" not in mllm.templates:
            return []
        starts = list(itertools.islice(itertools.cycle(STARTS), count))
        with set_aside(mllm):
            texts = sampled(mllm, starts, self.settings.prefix_tokens, generator)
        return [f"{text}. " for text in texts]
