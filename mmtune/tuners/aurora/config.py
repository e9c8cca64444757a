"""Aurora's settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mmtune.tuners.sited import SitedConfig

CHOICES = {
    "core": ("diagonal", "dense"),
    "block_layout": ("plain", "interleaved"),
    "compute": ("auto", "separate", "materialise"),
    "sharing": ("all", "branch", "layer"),
    "gate": (None, "off", "tanh", "reference"),
    "context": (None, "off", "tokens", "batch", "reference"),
}


@dataclass
class AuroraConfig(SitedConfig):
    """Mode approximation: one set of low-rank factors shared by all layers and branches.

    Every adapted weight is cut into blocks of its branch's width d (q, k, v, out: one; fc1 and fc2:
    four when the MLP is four times as wide). Block m of shape (d_out, d_in) gets

        dW_m = alpha * V . M(p_m)^T . U,    M(p)[i, j] = sum_k core[i, j, k] p[k]

    where U [R, d_in], V [d_out, R] and core are shared by all blocks of that shape, and the mode
    vector p_m [R] is the block's own. With core="diagonal", M(p) = diag(lambda * p) and the update
    is the CP decomposition of the paper, sum_r lambda_r p_{m,r} v_r u_r^T; with core="dense" it is
    the Tucker form that the released code computes. U, p start random, V at zero: a fresh adapter
    changes nothing, and in the first step only V has a gradient.

    Trainable parameters, for blocks of one shape: R (d_in + d_out) + C + M R, with C = R (diagonal)
    or R^3 (dense) and M the number of blocks.

    Where the chosen branches and layers read another branch by cross-attention (BLIP's text encoder
    and decoder, BLIP-2's Q-Former), the method has two more parts, whatever `sites` are. With s and
    y the outputs of such a layer's self- and cross-attention, norms and residuals included:

        gate "tanh":       y + tanh(a) * (gamma * s + beta)        a = beta = 0, gamma = 1; 3 d
        gate "reference":  0.1 (gamma_s * s + beta_s) + 0.1 (gamma_c * y + beta_c) added behind the
                           layer's last norm, all drawn from N(0, 0.0002^2); 4 d
        context "tokens":  y + alpha sum_j softmax_j(<y, s_j> / sqrt(d)) s_j over the words of the
                           same pair, padding left out; alpha = 0; 1. In encoders only: a decoder's
                           word would see later ones.

    In text mode (nothing to read) neither acts. The contexts "batch" and "reference" act on pooled
    features of fused pairs before the match head, in training only and only where the task asks for
    them: see `PooledContext`, which says what they leak.

    Merging: dW folds into the weight; the gates and context "tokens" act on hidden states and do
    not, so an adapter that has one refuses to be merged. With "off" for both it merges.

    Args:
        rank: R, components shared by all branches.
        alpha: factor on the update (a plain factor, not divided by the rank).
        dropout: probability of dropping a component of the rank-R activation while training.
        core: "diagonal" or "dense".
        block_layout: "plain" cuts fc1 and fc2 into contiguous blocks, one mode vector each;
            "interleaved" mixes their mode vectors as the released code does (dense core only).
        sites: roles to adapt, or branch -> roles. ["q", "k", "v", "out"] is the paper's choice; the
            released code has {vision: [q, k, v, out, fc1, fc2], text: [q, k, v]}.
        sharing: which blocks of one shape share U, V and core: those of "all" layers and branches,
            those of a "branch", or those of a "layer" of a branch (an ablation: the count of the
            factors above is then paid once for each).
        gate: "tanh", "reference" or "off"; None means "tanh" where a chosen layer reads another
            branch and "off" where none does (CLIP). Settled when the adapter is made.
        context: "tokens", "batch", "reference" or "off"; None means "tokens" where an encoder's
            words read another branch and "off" elsewhere. Settled when the adapter is made.
        branch_ranks: branch -> rank (at most `rank`, which it may lower for that branch): the
            branch uses the first components of the shared factors.
        compute: "separate" multiplies tokens by the factors; "materialise" adds dW to the weight
            first. The results differ by rounding, in bf16 too: updates that are small beside W are
            lost to W's rounding, as they are to that of the outputs. "auto" materialises where that
            multiplies fewer numbers, for more than d_in d_out / (d_in + d_out) tokens, and never
            with dropout. `mmtune bench`: 27 % off a step of CLIP ViT-L/14 on an H200.
        branches, layers, seed, adapted: see `SitedConfig`.

    Source:
        "Parameter-efficient Tuning of Large-scale Multimodal Foundation Models", NeurIPS 2023,
        arXiv 2305.08381, section 3.2. Differs from the released code in the diagonal core, the
        plain layout and the unit initial lambda; core="dense" with block_layout="interleaved" is
        its form. Its gate and context are those called "reference"; "tanh" and "tokens" keep their
        purpose, start at nothing and never look beyond a pair.
    """

    peft_name: ClassVar[str] = "AURORA"

    rank: int = 64
    alpha: float = 1.0
    dropout: float = 0.0
    core: Literal["diagonal", "dense"] = "diagonal"
    block_layout: Literal["plain", "interleaved"] = "plain"
    sharing: Literal["all", "branch", "layer"] = "all"
    gate: Literal["off", "tanh", "reference"] | None = None
    context: Literal["off", "tokens", "batch", "reference"] | None = None
    sites: list[str] | dict[str, list[str]] = field(default_factory=lambda: ["q", "k", "v", "out"])
    branch_ranks: dict[str, int] = field(default_factory=dict)
    compute: Literal["auto", "separate", "materialise"] = "auto"

    def problems(self) -> Iterator[str]:
        if self.rank < 1:
            yield f"aurora.rank must be at least 1, got {self.rank}. Try 64."
        if not 0 <= self.dropout < 1:
            yield f"aurora.dropout must be in [0, 1), got {self.dropout}"
        for key, known in CHOICES.items():
            if getattr(self, key) not in known:
                names = ", ".join(str(name) for name in known[:-1])
                yield f"aurora.{key} must be {names} or {known[-1]}, got {getattr(self, key)!r}"
        if self.block_layout == "interleaved" and self.core != "dense":
            yield (
                "aurora.block_layout: interleaved mixes the entries of a dense core; "
                "set core: dense, or block_layout: plain"
            )
        if self.block_layout == "interleaved" and self.branch_ranks:
            yield "aurora.branch_ranks needs block_layout: plain; interleaving mixes components"
        if self.compute == "materialise" and self.dropout > 0:
            yield "aurora.dropout acts on the rank-R activation; it needs compute: separate"
        for branch, rank in self.branch_ranks.items():
            if not 1 <= rank <= self.rank:
                yield (
                    f"aurora.branch_ranks.{branch} must be in 1..{self.rank} (rank, the shared "
                    f"factors' size), got {rank}. Raise rank to go higher."
                )

    def forms(self) -> bool:
        """Whether updates are ever added to weights in a forward pass."""
        return self.compute == "materialise" or (self.compute == "auto" and not self.dropout)

    def rank_of(self, branch: str) -> int:
        """Components that `branch` uses."""
        return self.branch_ranks.get(branch, self.rank)

    def kept(self) -> list[str]:
        """The parts that act on hidden states in every forward pass; no weight can hold them."""
        gate = [f"gate {self.gate}"] if self.gate in ("tanh", "reference") else []
        return gate + (["context tokens"] if self.context == "tokens" else [])
