"""MEND's gradient transform: a weight's gradient, token by token, becomes a better update.

A linear layer's weight gradient is sum_t delta_t x_t^T: x_t its input at token t, delta_t the loss
gradient at its output. A small network maps each (x_t, delta_t) to (x~_t, delta~_t), and the update
is a step along sum_t delta~_t x~_t^T: of rank at most t, so that it is kept as two factors.

Source: Mitchell et al., Fast Model Editing at Scale, arXiv 2110.11309, sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

STD_EPS = 1e-7
RANK = 1920  # of the released networks, at most the width


class LowRankLayer(nn.Module):
    """h <- h + max(0, (h V^T U^T + bias) * scale[mode] + shift[mode]).

    The identity at the start: U, bias and shift are zero.

    Args:
        width: d.
        rank: r, cut to d.
        modes: number of weights that share the layer; None has neither scale nor shift.
        generator: of the draw of V.

    Shape: `u` [d, r], `v` [r, d], `bias` [d], `scale` and `shift` [modes, d].
    """

    def __init__(
        self,
        width: int,
        rank: int,
        modes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        inner = min(rank, width)
        self.u = nn.Parameter(torch.zeros(width, inner))
        self.v = nn.Parameter(torch.randn(inner, width, generator=generator))
        self.bias = nn.Parameter(torch.zeros(width))
        if modes is not None:
            self.scale = nn.Parameter(torch.ones(modes, width))
            self.shift = nn.Parameter(torch.zeros(modes, width))
        self.modes = modes

    def forward(self, hidden: Tensor, mode: int | None = None) -> Tensor:
        inner = hidden @ self.v.T @ self.u.T + self.bias
        if self.modes is not None:
            inner = inner * self.scale[mode] + self.shift[mode]
        # Gradients must pass at exactly zero, where every row starts. Those of relu do not, and
        # those of clamp do in some versions of torch only: the transform would never learn.
        return hidden + torch.where(inner < 0, 0.0, inner)


class RunningStatistics(nn.Module):
    """Mean and standard deviation of all rows seen so far, and their number.

    Kept in float64, also where the module is cast, and in the state dict, so that training resumes
    with the same normaliser.

    Args:
        width: d.

    Shape: `mean` [d], `squares` [d] (sum of squared deviations), `count` [].
    """

    mean: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @property
    def std(self) -> Tensor:
        """[d], with count - 1 below.

        Raises:
            ValueError: fewer than two rows were seen.
        """
        if self.count < 2:
            raise ValueError(
                f"a standard deviation needs at least 2 rows, got {int(self.count)}: train the "
                "editor first, or edit with an answer of more tokens"
            )
        return (self.squares / (self.count - 1)).sqrt()

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Add rows [n, d]; equal to adding them one by one.

        Source: Chan, Golub, LeVeque, Updating formulae for computing sample variances, 1979.
        """
        if not len(rows):
            return
        exact = rows.detach().to(self.mean)
        mean, known, new = exact.mean(0), int(self.count), len(rows)
        apart, total = mean - self.mean, known + new
        self.squares += (exact - mean).square().sum(0) + apart.square() * (known * new / total)
        self.mean += apart * (new / total)
        self.count.fill_(total)

    def _apply(self, fn: Any, recurse: bool = True) -> RunningStatistics:
        exact = self.mean, self.squares
        super()._apply(fn, recurse)
        self.mean, self.squares = (old.to(self.mean.device) for old in exact)
        return self

    def forward(self, rows: Tensor) -> Tensor:
        """(rows - mean) / (std + 1e-7); the result is never scaled back."""
        return (rows - self.mean.to(rows)) / (self.std.to(rows) + STD_EPS)


@dataclass(frozen=True)
class TransformOptions:
    """The network's layout.

    Attributes:
        rank: of each layer, at most its width.
        layers: of each network.
        combine: one network over x and delta together; else one for each.
        normalise: subtract running means and divide by standard deviations first.
        modes: number of weights of one shape that share the network, each with a scale and a shift;
            None for a network of a single weight, without them.
    """

    rank: int = RANK
    layers: int = 2
    combine: bool = True
    normalise: bool = True
    modes: int | None = None


class GradientTransform(nn.Module):
    """(x, delta) -> (x~, delta~) for the weights of one shape; the identity at the start.

    In training mode the statistics take in a call's rows before these are normalised.

    Args:
        inputs: width of x.
        outputs: width of delta.
        options: see `TransformOptions`.
        generator: of the weights' draw.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        options: TransformOptions | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.options = chosen = options or TransformOptions()
        widths = [inputs + outputs] if chosen.combine else [inputs, outputs]
        self.networks = nn.ModuleList(
            nn.ModuleList(
                LowRankLayer(width, chosen.rank, chosen.modes, generator)
                for _ in range(chosen.layers)
            )
            for width in widths
        )
        if chosen.normalise:
            self.x_statistics = RunningStatistics(inputs)
            self.delta_statistics = RunningStatistics(outputs)

    def forward(self, x: Tensor, delta: Tensor, mode: int | None = None) -> tuple[Tensor, Tensor]:
        """Transform a layer's rows.

        Args:
            x: [..., in] inputs of the layer, a row a token.
            delta: [..., out] loss gradients at its output.
            mode: which of the weights that share the network it is, from 0.

        Returns:
            [n, in] and [n, out] of the n rows in which neither is all zero.

        Raises:
            ValueError: a mode that there is not, or fewer than two rows seen in all.
        """
        self._check(mode)
        x, delta = nonzero_rows(x, delta)
        if self.options.normalise:
            if self.training:
                self.x_statistics.update(x)
                self.delta_statistics.update(delta)
            x, delta = self.x_statistics(x), self.delta_statistics(delta)
        if not self.options.combine:
            return self._through(0, x, mode), self._through(1, delta, mode)
        both = self._through(0, torch.cat([x, delta], dim=-1), mode)
        return both[:, : x.shape[1]], both[:, x.shape[1] :]

    def _through(self, network: int, hidden: Tensor, mode: int | None) -> Tensor:
        layers: Any = self.networks[network]
        for layer in layers:
            hidden = layer(hidden, mode)
        return hidden

    def _check(self, mode: int | None) -> None:
        modes = self.options.modes
        if (mode is None) != (modes is None) or (mode is not None and not 0 <= mode < (modes or 0)):
            allowed = "None" if modes is None else f"in 0..{modes - 1}"
            raise ValueError(f"mode must be {allowed} for this transform, got {mode}")


def nonzero_rows(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """[..., in] and [..., out] -> [n, in] and [n, out]: rows in which neither is all zero."""
    x, delta = x.flatten(0, -2), delta.flatten(0, -2)
    kept = x.ne(0).any(-1) & delta.ne(0).any(-1)
    return x[kept], delta[kept]


def update_factors(
    x: Tensor,
    delta: Tensor,
    rate: Tensor | float,
    sign: Literal["descent", "reference"] = "descent",
) -> tuple[Tensor, Tensor]:
    """(left [out, n], right [n, in]): left @ right is what to add to a weight [out, in].

    Args:
        x: [n, in] as transformed.
        delta: [n, out] as transformed.
        rate: learned step size.
        sign: "descent" subtracts rate * sum_t delta_t x_t^T: with the identity transform and a
            positive rate a step of gradient descent. "reference" adds it, as the released code
            does, which raises the loss until training has turned it round.
    """
    step = -rate if sign == "descent" else rate
    return step * delta.T, x


@dataclass
class Captured:
    """What linear layers read and gave in one forward pass.

    Attributes:
        inputs: by layer, [..., in], detached.
        outputs: by layer, [..., out], part of the graph.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, loss: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> (x [..., in], delta [..., out] = d loss / d output), both detached.

        Args:
            loss: scalar computed from the outputs: for MEND the mean NLL of the answer tokens.

        Raises:
            RuntimeError: the loss does not depend on a layer (torch's).
        """
        deltas = torch.autograd.grad(loss, [*self.outputs.values()])
        return {
            name: (self.inputs[name], delta)
            for name, delta in zip(self.outputs, deltas, strict=True)
        }


@contextmanager
def captured(layers: Mapping[str, nn.Module]) -> Iterator[Captured]:
    """Record what `layers` read and give during one forward pass inside the `with`.

    Gradients flow from the first of them on, also through a frozen model; no weight gets one.

    Raises:
        RuntimeError: a layer is called a second time.
    """
    found = Captured()

    def record(name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if name in found.outputs:
            raise RuntimeError(f"layer {name} ran twice: capture one forward pass at a time")
        found.inputs[name] = inputs[0].detach()
        found.outputs[name] = output if output.requires_grad else output.requires_grad_()

    handles = [layer.register_forward_hook(partial(record, name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
