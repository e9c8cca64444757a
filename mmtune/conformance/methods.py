"""The method x backbone matrix: a method is a row of METHODS, a backbone a row of BACKBONES."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmtune.conformance.backbones import BACKBONES, CROSS, Tower

if TYPE_CHECKING:
    from torch import nn

Towers = Mapping[str, Tower]
PAIRWISE = ("open_clip", "open_clip-fused", "open_clip-timm", "clip", "siglip")


@dataclass(frozen=True)
class MethodCase:
    """One row: a method, settings, and its trainable count in closed form.

    Attributes:
        method: name of the method.
        settings: values of its options.
        count: towers of a backbone -> trainable parameters.
        merges: whether it folds into the stock weights.
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
    starts_at_base: bool = True
    base: Callable[[nn.Module], Any] = lambda model: model
    stored: Callable[[Towers], int] = lambda _: 0
    idle: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    backbones: tuple[str, ...] = field(default_factory=lambda: tuple(BACKBONES))


def aurora_count(towers: Towers, rank: int, sites: Any, core: int, ranks: Any = None) -> int:
    """R (d_in + d_out) + core for each block shape, and a mode vector for each block."""
    shapes, modes = set(), 0
    for branch, tower in towers.items():
        r, d = (ranks or {}).get(branch, rank), tower.width
        for role, (out, into) in tower.linears().items():
            if role in (sites.get(branch, ()) if isinstance(sites, dict) else sites):
                rows = out // d if role == "fc1" and out % d == 0 else 1
                columns = into // d if role == "fc2" and into % d == 0 else 1
                shapes.add((out // rows, into // columns))
                modes += tower.layers * rows * columns * r
    return sum(rank * (out + into) + core for out, into in shapes) + modes


def adapter_count(towers: Towers, m: int, ends: tuple[str, ...], above: int = 0) -> int:
    """2 d m + m + d for each sublayer that ends in one of `ends`, above the first layers."""
    return sum(
        sublayers(tower, ends, above) * (2 * tower.width * m + m + tower.width)
        for tower in towers.values()
    )


def sublayers(tower: Tower, ends: tuple[str, ...], above: int = 0) -> int:
    """How many end in one of these roles; the layers that T5 crosses are its last."""
    layers = tower.layers - above
    crossed = min(tower.crossed, layers) if "cross_out" in ends else 0
    return layers * len(set(ends) & set(tower.roles)) + crossed


def fusion_count(towers: Towers, ends: tuple[str, ...]) -> int:
    """3 d^2 + 2 d for each sublayer."""
    return sum(
        sublayers(tower, ends) * (3 * tower.width**2 + 2 * tower.width) for tower in towers.values()
    )


def bias_count(towers: Towers, sites: Any, norms: bool = True) -> int:
    """The outputs of the chosen Linears with biases, and the LayerNorms' width."""
    linears = sum(
        tower.layers * out
        for tower in towers.values()
        for role, (out, _) in tower.linears().items()
        if tower.biases and role in sites
    )
    return linears + (sum(t.norms * t.width for t in towers.values()) if norms else 0)


def low_rank_count(towers: Towers, rank: int, sites: Any) -> int:
    """R (d_in + d_out) for each adapted weight."""
    return sum(
        tower.layers * rank * (out + into)
        for tower in towers.values()
        for role, (out, into) in tower.linears().items()
        if role in sites
    )


def triplet_count(towers: Towers, rank: int, sites: Any) -> int:
    """R (d_in + d_out) + R for each adapted weight."""
    weights = sum(t.layers for t in towers.values() for role in t.linears() if role in sites)
    return low_rank_count(towers, rank, sites) + rank * weights


def quantised(model: nn.Module, compute_dtype: str) -> None:
    """The base of QLoRA: every layer's Linears in four bits."""
    from mmtune.tuners.qlora import quantise

    quantise(model, compute_dtype=compute_dtype)


def prefix_count(towers: Towers, p: int, m: int | None = None) -> int:
    """Flat 2 L p d; with a perceptron of bottleneck m: p d + (d m + m) + (2 L d m + 2 L d)."""
    total = 0
    for tower in towers.values():
        n, d = 2 * sum(tower.attentions()), tower.width
        total += p * n if m is None else p * d + (d * m + m) + (n * m + n)
    return total


ENDS = ("out", "cross_out", "fc2")


def virtual_token_count(towers: Towers, p: int, encoder: Callable[[int], int] = lambda _: 0) -> int:
    """P d and an encoder for each branch with tokens of its own; cross-attention alone has none."""
    widths = [tower.width for tower in towers.values() if "q" in tower.roles]
    return sum(p * d + encoder(d) for d in widths)


def mlp_adapter_count(towers: Towers, m: int, extra: int = 0) -> int:
    """2 d m + m + d (+ extra d + extra) for each MLP."""
    return sum(
        tower.layers * (2 * tower.width * m + m + tower.width + extra * (tower.width + 1))
        for tower in towers.values()
        if "fc2" in tower.roles
    )


def unipelt_count(towers: Towers, p: int, m: int, r: int) -> int:
    """Flat prefix, LoRA on q and v, adapter; two gates an attention and one an MLP; no decoder."""
    towers = {branch: tower for branch, tower in towers.items() if branch != "language"}
    low_rank = low_rank_count(towers, r, ["q", "v", "cross_q", "cross_v"])
    gates = sum(2 * len(t.attentions()) * (t.width + 1) for t in towers.values())
    return prefix_count(towers, p) + low_rank + gates + mlp_adapter_count(towers, m, extra=1)


EVERY = ["q", "k", "v", "out", "fc1", "fc2"]
METHODS: dict[str, MethodCase] = {
    "aurora": MethodCase("aurora", {"rank": 4}, lambda t: aurora_count(t, 4, EVERY[:4], 4)),
    "aurora-mlp": MethodCase(
        "aurora", {"rank": 4, "sites": EVERY}, lambda t: aurora_count(t, 4, EVERY, 4)
    ),
    "aurora-materialise": MethodCase(
        "aurora",
        {"rank": 4, "sites": EVERY, "compute": "materialise"},
        lambda t: aurora_count(t, 4, EVERY, 4),
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
    "bitfit": MethodCase("bitfit", {}, lambda t: bias_count(t, (*EVERY, *CROSS))),
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
