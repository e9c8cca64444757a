"""MEND: a trained network makes an update of low rank out of each weight's gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from editing.changes import Change, LowRank
from editing.meta.gradients import Rows, gradient_rows
from editing.meta.weights import TrainedWeightEditor, TrainedWeightOptions
from editing.methods.mend_transform import (
    RANK,
    GradientTransform,
    TransformOptions,
    update_factors,
)
from editing.ranges import Count, Positive

if TYPE_CHECKING:
    from editing.mllm import MLLM
    from editing.requests import EditRequest


@dataclass(frozen=True)
class MendOptions(TrainedWeightOptions):
    """Settings of MEND; the defaults are those of the released code for BLIP-2 and MiniGPT-4.

    Attributes:
        rank: of each layer of the network, at most its width.
        layers: of each network.
        combine: one network over x and delta together; else one for each.
        normalise: subtract running means and divide by standard deviations first.
        rate: each weight's step size at the start; it is learned.
        rate_lr: the learning rate of the step sizes.
        sign: "descent", or "reference" for the released code's, which climbs until it has learned
            not to.
    """

    rank: Count = RANK
    layers: Count = 2
    combine: bool = True
    normalise: bool = True
    rate: Positive = 1e-4
    rate_lr: Positive = 1e-4
    sign: Literal["descent", "reference"] = "descent"


class MendNetwork(nn.Module):
    """A `GradientTransform` for each shape of weight, and a step size for each weight.

    Args:
        shapes: weight -> [out, in], in order; weights of one shape share a transform, each with a
            mode of its own.
        settings: see `MendOptions`.
        generator: of the transforms' draw.

    Shape: `rates` [number of weights].
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        settings: MendOptions,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.sign: Literal["descent", "reference"] = settings.sign
        self.names = list(shapes)
        alike: dict[str, list[str]] = {}
        for name, shape in shapes.items():
            alike.setdefault(_key(shape), []).append(name)
        self.modes = {name: i for same in alike.values() for i, name in enumerate(same)}
        self.transforms = nn.ModuleDict()
        for key, same in alike.items():
            outputs, inputs = shapes[same[0]]
            options = TransformOptions(
                settings.rank, settings.layers, settings.combine, settings.normalise, len(same)
            )
            self.transforms[key] = GradientTransform(inputs, outputs, options, generator)
        self.rates = nn.Parameter(torch.full((len(shapes),), settings.rate))

    def forward(self, name: str, x: Tensor, delta: Tensor) -> LowRank:
        """The change of one weight from its rows, [n, in] and [n, out]."""
        transform = self.transforms[_key((delta.shape[1], x.shape[1]))]
        x, delta = transform(x.to(self.rates), delta.to(self.rates), self.modes[name])
        rate = self.rates[self.names.index(name)]
        return LowRank(*update_factors(x, delta, rate, self.sign))


def _key(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


class Mend(TrainedWeightEditor):
    """An update of low rank, by a network that reads the gradient's factors; see `mend_transform`.

        W <- W - rate sum_t delta~_t x~_t^T,    (x~_t, delta~_t) = network(x_t, delta_t), t tokens

    Numbers changed: all of the region's matrices, by a change of the rank of the tokens.

    The requests of one edit add up: it is the sum of the edits that each would be alone.

    Differs from the released code: updates descend from the start; the losses are taken over answer
    tokens; a batch of requests is the sum of its edits, where theirs is the edit of its mean loss.
    """

    name: ClassVar[str] = "mend"
    summary: ClassVar[str] = "a trained network makes an update of low rank out of a gradient"
    source: ClassVar[str] = "MEND, arXiv 2110.11309; on multimodal models in MMEdit, 2310.08475"
    options: ClassVar[type] = MendOptions

    def begin(self, mllm: MLLM, generator: torch.Generator) -> nn.Module:
        shapes = {name: tuple(weight.shape) for name, weight in self.weights(mllm).items()}
        return MendNetwork(shapes, self.settings, generator)

    def groups(self, network: nn.Module) -> list[dict[str, Any]]:
        rates = cast(MendNetwork, network).rates
        rest = [p for p in network.parameters() if p is not rates]
        return [
            {"params": rest},
            {"params": [rates], "lr": self.settings.rate_lr, "weight_decay": 0.0},
        ]

    def change(
        self, mllm: MLLM, network: nn.Module, request: EditRequest, rows: Mapping[str, Rows]
    ) -> dict[str, LowRank]:
        return {name: network(name, *own) for name, own in rows.items()}

    def changes(
        self, mllm: MLLM, network: nn.Module, requests: Sequence[EditRequest]
    ) -> dict[str, Change]:
        rows = gradient_rows(mllm, self.weights(mllm), requests)
        return {name: network(name, x, delta) for name, (x, delta) in rows.items()}


EDITORS = (Mend,)
