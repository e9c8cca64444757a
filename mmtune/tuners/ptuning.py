"""P-tuning: virtual tokens at chosen positions, computed by a small encoder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from mmtune.tuners.registry import Method, config_of, options_of
from mmtune.tuners.virtual_tokens import TrunkTokens, VirtualTokensConfig, VirtualTokensTuner


@dataclass
class PTuningConfig(VirtualTokensConfig):
    """P-tuning: p virtual tokens h = encoder(e) of learned vectors e [p, d].

        mlp:   h = W3 relu(W2 relu(W1 e))                 W1 [w, d], W2 [w, w], W3 [d, w]
        lstm:  h = W3 relu(W2 BiLSTM(e))                  2 layers, w in each direction;
                                                          W2 [2 w, 2 w], W3 [d, 2 w]

    all with biases. As in prompt tuning, tokens enter after the position embeddings and words keep
    their positions. A fresh adapter changes the outputs. After training, `eject` replaces the
    encoder by the tokens that it computes.

    Trainable parameters for each branch of width d: p d and the encoder's,
    mlp: 2 d w + w^2 + 2 w + d; lstm: 10 d w + 36 w^2 + 18 w + d.

    Args:
        encoder: "mlp", "lstm", or "none" (h = e), which `eject` leaves.
        width: w; None means the branch's own width d.
        positions: "start", behind a class or begin token; or p indices, each the place in the
            original sequence before which a token enters. Indices beyond the end mean the end.
        tokens, branches, layers, seed, adapted: see `VirtualTokensConfig`.

    Source:
        "GPT Understands, Too", arXiv 2103.10385, section 3.2. The encoders are PEFT's, with one
        bias for each gate of the LSTM where PyTorch adds two; the released code halves w in each of
        the LSTM's directions.
    """

    peft_name: ClassVar[str] = "PTUNING"
    key: ClassVar[str] = "ptuning"

    encoder: Literal["mlp", "lstm", "none"] = "mlp"
    width: int | None = None
    positions: Literal["start"] | list[int] = "start"

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.encoder not in ("mlp", "lstm", "none"):
            yield f"ptuning.encoder must be mlp, lstm or none, got {self.encoder!r}"
        if self.width is not None and self.width < 1:
            yield f"ptuning.width must be at least 1, got {self.width}. Leave it out for d."
        if self.positions == "start":
            return
        if isinstance(self.positions, str):
            yield f"ptuning.positions must be 'start' or a list of indices, got {self.positions!r}"
        elif len(self.positions) != self.tokens:
            yield (
                f"ptuning.positions names {len(self.positions)} places for ptuning.tokens = "
                f"{self.tokens} tokens; give one index for each token"
            )
        elif min(self.positions) < 0:
            yield f"ptuning.positions must not be negative, got {min(self.positions)}"


class BiLSTM(nn.Module):
    """Two bidirectional LSTM layers over one short sequence, of operations that compile.

    Shape: x [p, d] -> [p, 2 w].
    Parameters of layer l, for both directions, gates in PyTorch's order (input, forget, cell,
    output): input_l [2, d, 4 w], state_l [2, w, 4 w], bias_l [2, 1, 4 w].
    """

    def __init__(self, d: int, w: int) -> None:
        super().__init__()
        self.input_0 = nn.Parameter(torch.empty(2, d, 4 * w))
        self.state_0 = nn.Parameter(torch.empty(2, w, 4 * w))
        self.bias_0 = nn.Parameter(torch.empty(2, 1, 4 * w))
        self.input_1 = nn.Parameter(torch.empty(2, 2 * w, 4 * w))
        self.state_1 = nn.Parameter(torch.empty(2, w, 4 * w))
        self.bias_1 = nn.Parameter(torch.empty(2, 1, 4 * w))

    def forward(self, x: Tensor) -> Tensor:
        x = _both_ways(x, self.input_0, self.state_0, self.bias_0)
        return _both_ways(x, self.input_1, self.state_1, self.bias_1)


def _both_ways(x: Tensor, input_weight: Tensor, state_weight: Tensor, bias: Tensor) -> Tensor:
    """One LSTM layer, forwards and backwards at once: [p, d] -> [p, 2 w]."""
    arriving = torch.baddbmm(bias, torch.stack([x, x.flip(0)]), input_weight)  # [2, p, 4 w]
    state = cell = arriving.new_zeros(2, 1, state_weight.shape[1])
    states = []
    for step in arriving.split(1, dim=1):
        enter, keep, new, show = torch.baddbmm(step, state, state_weight).chunk(4, dim=-1)
        cell = keep.sigmoid() * cell + enter.sigmoid() * new.tanh()
        state = show.sigmoid() * cell.tanh()
        states.append(state)
    there, back = torch.cat(states, dim=1)
    return torch.cat([there, back.flip(0)], dim=-1)


class EncodedTokens(TrunkTokens):
    """The vectors of each adapter of one branch, and the encoder that makes tokens of them.

    Parameters of an adapter: mmtune_tokens[adapter] [p, d]; mmtune_lstm; mmtune_fc1 (mlp alone),
    mmtune_fc2, mmtune_fc3. Without an encoder: mmtune_tokens alone.
    """

    adapter_layer_names = ("mmtune_tokens", "mmtune_lstm", "mmtune_fc1", "mmtune_fc2", "mmtune_fc3")

    def __init__(self, trunk: Any) -> None:
        super().__init__(trunk)
        self.mmtune_lstm = nn.ModuleDict()
        self.mmtune_fc1 = nn.ModuleDict()
        self.mmtune_fc2 = nn.ModuleDict()
        self.mmtune_fc3 = nn.ModuleDict()

    def add_adapter(
        self, name: str, config: PTuningConfig, generator: torch.Generator | None
    ) -> None:
        d, p = self.trunk.width, config.tokens
        w = config.width or d
        at = config.positions
        self.at[name] = (self.trunk.start,) * p if isinstance(at, str) else tuple(at)
        self.mmtune_tokens[name] = nn.Parameter(torch.randn(p, d, generator=generator))
        if config.encoder == "none":
            return
        if config.encoder == "lstm":
            self.mmtune_lstm[name] = _drawn(BiLSTM(d, w), w, generator)
            w = 2 * w
        else:
            self.mmtune_fc1[name] = _drawn(nn.Linear(d, w), d, generator)
        self.mmtune_fc2[name] = _drawn(nn.Linear(w, w), w, generator)
        self.mmtune_fc3[name] = _drawn(nn.Linear(w, d), w, generator)

    def tokens(self, name: str) -> Tensor:
        x = super().tokens(name)
        if name not in self.mmtune_fc3:
            return x
        # In the parameters' own precision: what eject() stores is what was trained.
        with torch.autocast(x.device.type, enabled=False):
            if name in self.mmtune_lstm:
                x = self.mmtune_lstm[name](x)
            else:
                x = F.relu(self.mmtune_fc1[name](x))
            return self.mmtune_fc3[name](F.relu(self.mmtune_fc2[name](x)))

    def eject(self, name: str) -> None:
        """Store the adapter's tokens as they enter, and drop its encoder."""
        with torch.no_grad():
            self.mmtune_tokens[name].data = self.tokens(name).clone()
        for group in (self.mmtune_lstm, self.mmtune_fc1, self.mmtune_fc2, self.mmtune_fc3):
            if name in group:
                del group[name]


def _drawn(module: nn.Module, fan: int, generator: torch.Generator | None) -> nn.Module:
    """PyTorch's own initialisation: `fan` is a Linear's input width, or an LSTM's state's."""
    bound = 1 / math.sqrt(fan)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return module


class PTuningModel(VirtualTokensTuner):
    """Injects `EncodedTokens` into the trunk of each chosen branch."""

    attribute = "ptuning"
    tuner_layer_cls = EncodedTokens

    def _fill(self, holder: EncodedTokens, adapter_name: str, config: PTuningConfig) -> None:
        holder.add_adapter(adapter_name, config, self._generator)


def eject(model: PeftModel, adapter_name: str = "default") -> None:
    """Replace a trained encoder by the tokens that it computes, in place.

    Outputs stay the same bit for bit, and the saved adapter shrinks to p d numbers for each branch.
    The tokens can still be trained, by an optimiser made afterwards.

    Args:
        model: wrapped by P-tuning.
        adapter_name: the adapter to change.

    Raises:
        ValueError: the adapter has no encoder.
    """
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, PTuningConfig) or config.encoder == "none":
        there = ", ".join(f"{n} ({c.peft_type})" for n, c in model.peft_config.items())
        raise ValueError(
            f"adapter {adapter_name!r} has no encoder to drop: expected one of method ptuning with "
            f"encoder: mlp or lstm; there are {there}"
        )
    for module in model.modules():
        if isinstance(module, EncodedTokens) and adapter_name in module.mmtune_tokens:
            module.eject(adapter_name)
    config.encoder = "none"


PEFT_METHODS = {PTuningConfig.peft_name: (PTuningConfig, PTuningModel)}
METHODS = (
    Method(
        name="ptuning",
        summary="virtual tokens at chosen positions, computed by an MLP or a BiLSTM",
        source="arXiv 2103.10385 (AI Open 2024)",
        options=options_of(PTuningConfig, leave_out=["adapted", "layers"]),
        build=config_of(PTuningConfig),
    ),
)
