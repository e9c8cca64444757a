"""The method x backbone matrix: a method is a row of METHODS, a backbone a row of BACKBONES."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmtune.conformance.backbones import BACKBONES, CROSS
from mmtune.conformance.counts import (
    Towers,
    adapter_count,
    aurora_count,
    aurora_per_layer_count,
    bias_count,
    fused_count,
    fusion_count,
    low_rank_count,
    mlp_adapter_count,
    prefix_count,
    triplet_count,
    unipelt_count,
    virtual_token_count,
)

if TYPE_CHECKING:
    from torch import nn

PAIRWISE = ("open_clip", "open_clip-fused", "open_clip-timm", "clip", "siglip")
FUSED = ("blip-retrieval", "blip-vqa", "blip-caption", "blip2-opt", "blip2-t5", "minigpt4")

QWENS = ("qwen2.5-vl", "qwen2-vl", "qwen3-vl")


@dataclass(frozen=True)
class MethodCase:
    """One row: a method, settings, and its trainable count in closed form.

    Attributes:
        method: name of the method.
        settings: values of its options.
        count: towers of a backbone -> trainable parameters.
        merges: whether it folds into the stock weights.
        unmerged: backbones on which it does not, although it does elsewhere.
        starts_at_base: whether a fresh adapter changes nothing, bit for bit.
        base: what is done to the stock model, in place, to get the base that is adapted.
        stored: towers of a backbone -> numbers in its file beside the trained ones.
        idle: ending of the names of trainable tensors that change nothing by the method's algebra,
            so that their gradient is zero, or rounding.
        refused: backbone -> part of the sentence with which the method refuses it.
        backbones: those that this row is tried on.
    """

    method: str
    settings: Mapping[str, Any]
    count: Callable[[Towers], int]
    merges: bool = True
    unmerged: tuple[str, ...] = ()
    starts_at_base: bool = True
    base: Callable[[nn.Module], Any] = lambda model: model
    stored: Callable[[Towers], int] = lambda _: 0
    idle: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    backbones: tuple[str, ...] = field(default_factory=lambda: tuple(BACKBONES))

    def merges_on(self, backbone: str) -> bool:
        """Whether it folds into the stock weights of this backbone."""
        return self.merges and backbone not in self.unmerged


def quantised(model: nn.Module, compute_dtype: str) -> None:
    """The base of QLoRA: every layer's Linears in four bits."""
    from mmtune.tuners.qlora import quantise

    quantise(model, compute_dtype=compute_dtype)


ENDS = ("out", "cross_out", "fc2")
EVERY = ["q", "k", "v", "out", "fc1", "fc2"]
METHODS: dict[str, MethodCase] = {
    "aurora": MethodCase(
        "aurora",
        {"rank": 4},
        lambda t: aurora_count(t, 4, EVERY[:4], 4) + fused_count(t, 3, 1),
        unmerged=FUSED,
    ),
    "aurora-gate-reference": MethodCase(
        "aurora",
        {"rank": 4, "gate": "reference", "context": "off", "sites": [*EVERY[:4], *CROSS]},
        lambda t: aurora_count(t, 4, (*EVERY[:4], *CROSS), 4) + fused_count(t, 4),
        merges=False,
        starts_at_base=False,
        backbones=("blip-retrieval", "blip-caption", "blip2-opt"),
    ),
    "aurora-gate-tanh": MethodCase(
        "aurora",
        {"rank": 4, "gate": "tanh"},
        lambda t: 0,
        refused=dict.fromkeys(
            (*PAIRWISE, "llava"), "no layer whose cross-attention reads another branch"
        ),
        backbones=(*PAIRWISE, "llava"),
    ),
    "aurora-context-tokens": MethodCase(
        "aurora",
        {"rank": 4, "context": "tokens"},
        lambda t: 0,
        refused=dict.fromkeys(
            ("clip", "blip-caption", "blip2-opt", "blip2-t5"),
            "no layer in which words that all see one another read an image",
        ),
        backbones=("clip", "blip-caption", "blip2-opt", "blip2-t5"),
    ),
    "aurora-context-batch": MethodCase(
        "aurora",
        {"rank": 4, "context": "batch"},
        lambda t: 0,
        refused={"blip-vqa": "acts before the match head; this blip has none"},
        backbones=("blip-vqa",),
    ),
    "aurora-mlp": MethodCase(
        "aurora",
        {"rank": 4, "sites": EVERY, "gate": "off", "context": "off"},
        lambda t: aurora_count(t, 4, EVERY, 4),
    ),
    "aurora-materialise": MethodCase(
        "aurora",
        {
            "rank": 4,
            "sites": EVERY,
            "compute": "materialise",
            "gate": "off",
            "context": "off",
        },
        lambda t: aurora_count(t, 4, EVERY, 4),
    ),
    "aurora-per-layer": MethodCase(
        "aurora",
        {"rank": 4, "sharing": "layer"},
        lambda t: aurora_per_layer_count(t, 4, EVERY[:4], 4),
        backbones=("clip",),
    ),
    "aurora-dense-per-branch-rank": MethodCase(
        "aurora",
        {"rank": 4, "core": "dense", "sites": ["q", "v"], "branch_ranks": {"text": 2}},
        lambda t: aurora_count(t, 4, ["q", "v"], 4**3, {"text": 2}),
        backbones=PAIRWISE,
    ),
    "aurora-interleaved": MethodCase(
        "aurora",
        {
            "rank": 4,
            "core": "dense",
            "block_layout": "interleaved",
            "sites": {"text": ["fc1", "fc2"]},
        },
        lambda t: aurora_count(t, 4, {"text": ["fc1", "fc2"]}, 4**3),
        backbones=PAIRWISE,
    ),
    "lora": MethodCase(
        "lora",
        {"rank": 4, "sites": ["q", "v", "fc1"]},
        lambda t: low_rank_count(t, 4, ["q", "v", "fc1"]),
    ),
    "adalora": MethodCase(
        "adalora",
        {"init_rank": 4, "target_rank": 2},
        lambda t: triplet_count(t, 4, EVERY),
    ),
    # bfloat16 products amplify the last bits by which checkpointing changes a forward pass.
    "qlora": MethodCase(
        "qlora",
        {"rank": 4, "compute_dtype": "float32"},
        lambda t: low_rank_count(t, 4, EVERY),
        merges=False,
        base=lambda model: quantised(model, "float32"),
    ),
    "qlora-bfloat16": MethodCase(
        "qlora",
        {"rank": 4},
        lambda t: low_rank_count(t, 4, EVERY),
        merges=False,
        base=lambda model: quantised(model, "bfloat16"),
        backbones=PAIRWISE,
    ),
    "prefix": MethodCase(
        "prefix",
        {"tokens": 3, "bottleneck": 8},
        lambda t: prefix_count(t, 3, 8),
        merges=False,
        starts_at_base=False,
    ),
    "ptuning_v2": MethodCase(
        "ptuning_v2",
        {"tokens": 3},
        lambda t: prefix_count(t, 3),
        merges=False,
        starts_at_base=False,
    ),
    "mam": MethodCase(
        "mam",
        {"tokens": 3, "bottleneck": 6},
        lambda t: prefix_count(t, 3) + mlp_adapter_count(t, 6),
        merges=False,
        starts_at_base=False,  # the prefix; its adapters start at zero
    ),
    "unipelt": MethodCase(
        "unipelt",
        {"tokens": 3, "bottleneck": 6, "rank": 2},
        lambda t: unipelt_count(t, 3, 6, 2),
        merges=False,
        starts_at_base=False,  # the prefix; its adapters and LoRA start at zero
        refused=dict.fromkeys(QWENS, "packs all samples in one row in vision"),
    ),
    "unipelt-language": MethodCase(
        "unipelt",
        {"tokens": 3, "branches": ["language"]},
        lambda t: 0,
        refused=dict.fromkeys(
            ("blip-vqa", "blip-caption", "blip2-opt", "blip2-t5", "llava"),
            "a decoder's token would see later ones",
        ),
        backbones=("blip-vqa", "blip-caption", "blip2-opt", "blip2-t5", "llava"),
    ),
    "prefix-flat": MethodCase(
        "prefix",
        {"tokens": 3, "reparameterise": False},
        lambda t: prefix_count(t, 3),
        merges=False,
        starts_at_base=False,
    ),
    "bitfit": MethodCase("bitfit", {}, lambda t: bias_count(t, (*EVERY, *CROSS, "gate"))),
    "bitfit-q-fc1": MethodCase(
        "bitfit", {"sites": ["q", "fc1"]}, lambda t: bias_count(t, ["q", "fc1"], norms=False)
    ),
    "bitfit-language": MethodCase(
        "bitfit",
        {"branches": ["language"]},
        lambda t: bias_count({"language": t["language"]}, (*EVERY, *CROSS)),
        refused={
            "blip2-t5": "on blip2 in language has one; branches with biases: vision",
            "llava": "on llava in language has one; branches with biases: vision",
        },
        backbones=("blip-caption", "blip2-opt", "blip2-t5", "llava"),
    ),
    "adapter": MethodCase(
        "adapter", {"bottleneck": 4}, lambda t: adapter_count(t, 4, ENDS), merges=False
    ),
    "adapter-parallel": MethodCase(
        "adapter",
        {"bottleneck": 4, "parallel": True, "activation": "relu", "scale": 4.0},
        lambda t: adapter_count(t, 4, ENDS),
        merges=False,
    ),
    "adapter_drop": MethodCase(
        "adapter_drop",
        {"bottleneck": 4, "drop": 1},
        lambda t: adapter_count(t, 4, ENDS, above=1),
        merges=False,
    ),
    "adapter_drop-robust": MethodCase(
        "adapter_drop",
        {"bottleneck": 4, "robust": True, "parallel": True},
        lambda t: adapter_count(t, 4, ENDS),
        merges=False,
        backbones=PAIRWISE,
    ),
    "adapter_fusion": MethodCase(
        "adapter_fusion",
        {"adapters": {"a": "random:0", "b": "random:1"}},
        lambda t: fusion_count(t, ENDS),
        merges=False,
        starts_at_base=False,
        stored=lambda t: 2 * adapter_count(t, 64, ENDS),
        idle="key_bias",  # the same for all adapters, which softmax does not see
    ),
    "adapter-mlp-norms": MethodCase(
        "adapter",
        {"bottleneck": 4, "placement": "mlp", "train_norms": True},
        lambda t: adapter_count(t, 4, ("fc2",)) + sum(2 * u.norms * u.width for u in t.values()),
        merges=False,
        backbones=PAIRWISE,
    ),
    "prompt": MethodCase(
        "prompt",
        {"tokens": 4},
        lambda t: virtual_token_count(t, 4),
        merges=False,
        starts_at_base=False,
    ),
    "prompt-uniform-text": MethodCase(
        "prompt",
        {"tokens": 4, "init": "uniform", "branches": ["text"]},
        lambda t: 4 * t["text"].width,
        merges=False,
        starts_at_base=False,
        backbones=PAIRWISE,
    ),
    "prompt-fusion": MethodCase(
        "prompt",
        {"tokens": 4, "branches": ["fusion"]},
        lambda t: 4 * t["fusion"].width,
        merges=False,
        starts_at_base=False,
        refused=dict.fromkeys(
            ("blip-retrieval", "blip-vqa"), "virtual tokens enter where a branch takes its input"
        ),
        backbones=("blip-retrieval", "blip-vqa", "blip2-opt"),
    ),
    "ptuning": MethodCase(
        "ptuning",
        {"tokens": 3, "width": 8},
        lambda t: virtual_token_count(t, 3, lambda d: 2 * d * 8 + 8**2 + 2 * 8 + d),
        merges=False,
        starts_at_base=False,
    ),
    "ptuning-lstm-within": MethodCase(
        "ptuning",
        {"tokens": 3, "encoder": "lstm", "width": 8, "positions": [1, 2, 4]},
        lambda t: virtual_token_count(t, 3, lambda d: 10 * d * 8 + 36 * 8**2 + 18 * 8 + d),
        merges=False,
        starts_at_base=False,
    ),
}
PAIRS = [(m, b) for m, case in METHODS.items() for b in case.backbones if b not in case.refused]


def matrix() -> dict[str, dict[str, bool]]:
    """Method -> backbone -> whether at least one row passes there."""
    found: dict[str, dict[str, bool]] = {}
    for case in METHODS.values():
        cells = found.setdefault(case.method, dict.fromkeys(BACKBONES, False))
        for backbone in case.backbones:
            cells[backbone] |= backbone not in case.refused
    return dict(sorted(found.items()))


def refusals() -> list[tuple[str, str, str]]:
    """(row, backbone, part of the sentence) of everything that is refused."""
    return [(name, b, why) for name, case in METHODS.items() for b, why in case.refused.items()]
