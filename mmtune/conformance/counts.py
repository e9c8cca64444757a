"""Trainable parameters of every method in closed form, from the sizes of a backbone's towers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mmtune.conformance.backbones import Tower

Towers = Mapping[str, Tower]


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


def aurora_per_layer_count(towers: Towers, rank: int, sites: Any, core: int) -> int:
    """The same with factors of its own for every layer."""
    return sum(
        tower.layers * aurora_count({branch: replace(tower, layers=1)}, rank, sites, core)
        for branch, tower in towers.items()
    )


def fused_count(towers: Towers, gate: int, context: int = 0) -> int:
    """Aurora's gate * d a layer with cross-attention, and `context` where words read an image."""
    fused = [(branch, t) for branch, t in towers.items() if "cross_q" in t.roles]
    words = sum(t.layers for branch, t in fused if branch == "fusion" and "q" not in t.roles)
    return sum(t.layers * gate * t.width for _, t in fused) + context * words


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
        if role in sites and (tower.biases is True or role in (tower.biases or ()))
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


def prefix_count(towers: Towers, p: int, m: int | None = None) -> int:
    """Flat 2 L p d; with a perceptron of bottleneck m: p d + (d m + m) + (2 L d m + 2 L d)."""
    total = 0
    for tower in towers.values():
        n, d = 2 * sum(tower.attentions()), tower.width
        total += p * n if m is None else p * d + (d * m + m) + (n * m + n)
    return total


def virtual_token_count(towers: Towers, p: int, encoder: Callable[[int], int] = lambda _: 0) -> int:
    """P d and an encoder for each branch with tokens of its own; cross-attention alone has none."""
    widths = [tower.width for tower in towers.values() if "q" in tower.roles and tower.trunk]
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
