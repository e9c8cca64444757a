"""Gated query transformation: text that fades in a deep fusion branch is given back to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

REFERENCE_SCALE, REFERENCE_SPREAD = 0.1, 0.0002


class TanhGate(nn.Module):
    """What is added to a layer's cross-attention output: tanh(a) * (gamma * s + beta).

    a = 0, gamma = 1, beta = 0 at start: nothing is added, and in the first step only a has a
    gradient.

    Shape: s [b, t, d] -> [b, t, d]; s is the output of the layer's self-attention.
    Parameters: a, gamma, beta [d]; all products are elementwise.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(width))
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, s: Tensor) -> Tensor:
        return self.a.tanh() * (self.gamma * s + self.beta)


class ReferenceGate(nn.Module):
    """What the released code adds behind a layer's last norm.

        0.1 (gamma_s * s + beta_s) + 0.1 (gamma_c * y + beta_c)

    All four start from a normal distribution of deviation 0.0002, so a fresh gate is close to
    nothing but not nothing.

    Shape: s, y [b, t, d] -> [b, t, d]; outputs of the layer's self- and cross-attention.
    Parameters: scale_self, shift_self, scale_cross, shift_cross [d].
    """

    def __init__(self, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()

        def drawn() -> nn.Parameter:
            return nn.Parameter(REFERENCE_SPREAD * torch.randn(width, generator=generator))

        self.scale_self, self.shift_self = drawn(), drawn()
        self.scale_cross, self.shift_cross = drawn(), drawn()

    def forward(self, s: Tensor, y: Tensor) -> Tensor:
        queries = self.scale_self * s + self.shift_self
        return REFERENCE_SCALE * (queries + self.scale_cross * y + self.shift_cross)
