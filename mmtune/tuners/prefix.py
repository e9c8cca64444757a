"""Prefix tuning: learned keys and values before those of every attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from peft import PeftModel

from mmtune.tuners.registry import Method, config_of, options_of
from mmtune.tuners.sited import SitedConfig
from mmtune.tuners.virtual_keys import VirtualKeys, VirtualKeysTuner


@dataclass
class PrefixConfig(SitedConfig):
    """Prefix tuning: p learned keys P_K and values P_V before those of every attention.

        Attention(q, [P_K; K], [P_V; V])

    of every self- and cross-attention in the chosen branches and layers. Every query sees the
    prefix, whatever its mask; it holds no position and takes no room in the context. With
    `reparameterise`, an embedding E [p, d] of each branch goes through tanh(E W_1 + b_1) W_2 + b_2,
    d -> m -> 2 L d; `eject` replaces that by what it computes. A prefix changes the output from the
    first step on: there is no start at the base model.

    Trainable parameters of a branch of width d with L attentions (self and cross): p d + (d m + m)
    + (2 L d m + 2 L d) reparameterised, 2 L p d flat. Where keys are not d wide (grouped-query
    attention, T5), 2 L d stands for twice the summed widths of the keys.

    Args:
        tokens: p, length of the prefix. The paper's best were 10 (tables to text) and 200
            (summaries).
        reparameterise: train the perceptron (the paper's choice) rather than the prefix itself.
        bottleneck: m.
        branches, layers, seed, adapted: see `SitedConfig`.

    Source:
        "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021, arXiv 2101.00190,
        section 4. Differs from the released code in computing, for each attention, only its part of
        W_2, and in leaving dropout on the prefix out.
    """

    peft_name: ClassVar[str] = "PREFIX"

    tokens: int = 30
    reparameterise: bool = True
    bottleneck: int = 512

    def problems(self) -> Iterator[str]:
        if self.tokens < 1:
            yield f"prefix.tokens must be at least 1, got {self.tokens}. Try 30."
        if self.bottleneck < 1:
            yield f"prefix.bottleneck must be at least 1, got {self.bottleneck}. Try 512."

    def lengths(self) -> dict[str, int]:
        """The prefix is one part of p tokens."""
        return {"prefix": self.tokens}

    def perceptron(self) -> int | None:
        """M, or None for a flat prefix."""
        return self.bottleneck if self.reparameterise else None


class Prefixes(VirtualKeys):
    """The prefixes of all attentions."""


class PrefixModel(VirtualKeysTuner):
    """Prefix tuning as a PEFT tuner."""

    tuner_layer_cls = keys_class = Prefixes
    keys_name = "prefixes"


def eject(model: PeftModel, adapter_name: str = "default") -> None:
    """Replace a trained perceptron by the prefix that it computes, in place.

    Outputs in float32 stay the same bit for bit, and the saved adapter shrinks to 2 L p d numbers.
    The prefix can still be trained, by an optimiser made afterwards.

    Args:
        model: wrapped by prefix tuning or P-tuning v2.
        adapter_name: the adapter to change.

    Raises:
        ValueError: the adapter has no perceptron.
    """
    config: Any = model.peft_config.get(adapter_name)
    if not getattr(config, "reparameterise", False):
        there = "is flat already" if hasattr(config, "reparameterise") else "is no prefix"
        raise ValueError(
            f"adapter {adapter_name!r} {there}: only a reparameterised prefix (method prefix or "
            f"ptuning_v2 with reparameterise: true) has a perceptron to drop"
        )
    for module in model.modules():
        if isinstance(module, VirtualKeys) and adapter_name in module.slots:
            module.flatten(adapter_name)
    config.reparameterise = False


PEFT_METHODS = {PrefixConfig.peft_name: (PrefixConfig, PrefixModel)}
METHODS = (
    Method(
        name="prefix",
        summary="prefix tuning: learned keys and values before those of every attention",
        source="arXiv 2101.00190 (ACL 2021)",
        options=options_of(PrefixConfig, leave_out=["adapted"]),
        build=config_of(PrefixConfig),
    ),
)
