"""What can be tuned: a backbone lists its places by meaning and embeds images and texts.

A method never sees a regular expression and a config never sees a module path; both speak of sites.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from mmtune.suggestions import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmtune.backbones.fusions import Fusion
    from mmtune.backbones.trunks import Trunk

BRANCHES = ("vision", "text", "fusion", "language", "projector")
LAYER_ROLES = ("layer", "attention", "q", "k", "v", "out", "mlp", "gate", "fc1", "fc2", "norm")
CROSS_ROLES = ("cross_attention", "cross_q", "cross_k", "cross_v", "cross_out")
ROLES = ("embed", *LAYER_ROLES, *CROSS_ROLES, "head")


class SiteError(ValueError):
    """A branch, role or layer that the backbone does not have; the message lists those it has."""


@dataclass(frozen=True)
class Site:
    """One place of a backbone.

    Attributes:
        branch: one of `BRANCHES`.
        layer: index in the branch counted from the input, or None where layers have no meaning.
        role: one of `ROLES`.
        path: dotted module path inside the unwrapped model.
        module: the module itself (a Linear for q, k, v, out, gate, fc1, fc2 and cross_q ...).
        width: hidden width of the branch; Aurora cuts the MLP's weights into blocks of this width.
    """

    branch: str
    layer: int | None
    role: str
    path: str
    module: nn.Module = field(repr=False, compare=False)
    width: int = 0


@dataclass(frozen=True)
class PairEmbeddings:
    """Embeddings of b images and b texts from one forward pass through the wrapped model.

    Attributes:
        image: [b, e], L2-normalised.
        text: [b, e], L2-normalised.
        scale: scalar tensor that multiplies cosine similarities (already exponentiated).
        bias: scalar tensor added to the logits (SigLIP), or None.
    """

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class ImageSpec:
    """How pixels become model input: size in pixels, normalisation in [0, 1] units, resampling."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize: str = "shortest"  # "shortest": shorter edge to size, centre crop; "squash": both edges


@dataclass(frozen=True)
class Loaded:
    """A model with what is needed to feed it.

    Attributes:
        model: the unwrapped stock model.
        backbone: the view of it that lists sites and embeds inputs.
        image: pixels to input.
        tokenize: list of n texts -> {"input_ids": [n, t], "attention_mask": [n, t]} (int64 tensors;
            attention_mask is absent where the family has none). Truncates to the context length.
        context_length: tokens the text tower takes.
        name: the name it was loaded by, such as "zoo:tiny-clip".
        count_tokens: text -> its length in tokens before truncation.
        tokenizer: that of a transformers model, for what a model writes; else None.
        processor: the stock image processor of a family that reads images of several sizes
            (`Generative.pixels`); None where all become squares, as `image` says.
    """

    model: nn.Module
    backbone: Backbone
    image: ImageSpec
    tokenize: Callable[[Sequence[str]], dict[str, Tensor]]
    context_length: int
    name: str
    count_tokens: Callable[[str], int]
    tokenizer: Any = None
    processor: Any = None


def hooked(module: nn.Module) -> bool:
    """Whether something happens around a module's forward; accelerate brings weights there."""
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))


class Backbone(ABC):
    """The view of one stock model: its sites, and how images and texts are embedded.

    `model` arguments of the embedding methods may be wrapped (PeftModel, DistributedDataParallel);
    the backbone itself is made from the unwrapped model.

    Attributes:
        family: name of the kind of model.
        summary: one line about it.
        packed: branches whose layers are given the tokens of all samples in one row, [n, d].
    """

    family: ClassVar[str]
    summary: ClassVar[str]
    packed: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @classmethod
    @abstractmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether this family describes `model`; must not import heavy libraries to answer."""

    @abstractmethod
    def iter_sites(self) -> Iterator[Site]:
        """Yield every site of the prepared model, in forward order."""

    @abstractmethod
    def embed_pairs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> PairEmbeddings:
        """Embed `batch` = {pixel_values [b, 3, s, s], input_ids [b, t], attention_mask [b, t]?}.

        Calls `model(...)` once, so that wrappers (DDP, PEFT) see a forward pass.
        """

    @abstractmethod
    def encode_image(self, model: nn.Module, pixel_values: Tensor) -> Tensor:
        """[b, 3, s, s] -> [b, e], L2-normalised."""

    @abstractmethod
    def encode_text(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """[b, t] -> [b, e], L2-normalised."""

    def prepare(self) -> None:
        """Show fused attention as q, k, v, out Linears; compute QuickGELU in one kernel."""
        from mmtune.backbones.quick_gelu import quicken

        quicken(self.model)

    def restore(self) -> None:
        """Undo `prepare`: the stock module layout, with the present weights."""
        from mmtune.backbones.quick_gelu import slow

        slow(self.model)

    @abstractmethod
    def set_gradient_checkpointing(self, enable: bool = True) -> bool:
        """Recompute layers in the backward pass; returns whether this model can."""

    def trunks(self) -> dict[str, Trunk]:
        """Where virtual tokens enter each branch that has an input of its own."""
        return {}

    def fusions(self) -> list[Fusion]:
        """The layers whose cross-attention reads another branch, in forward order."""
        return []

    def sites(self) -> list[Site]:
        """Every site, in forward order. Raises SiteError on an unprepared model."""
        return list(self.iter_sites())

    def select(
        self,
        branches: Sequence[str] | None = None,
        roles: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        layers: str | Sequence[int] = "all",
    ) -> list[Site]:
        """Choose sites by meaning.

        Args:
            branches: names of branches; None means every branch (those that `roles` names, where it
                is a mapping).
            roles: names of roles; or branch -> names of roles; None means every role. A role that
                only some of the branches have is taken where it exists.
            layers: "all", "first:N", "last:N", or indices (negative ones count from the end), taken
                within each branch. Sites without a layer are chosen only by "all".

        Returns:
            The chosen sites in forward order, at least one.

        Raises:
            SiteError: a name or layer this backbone does not have; the message lists those it has.
        """
        every = self.sites()
        have_branches = _ordered(s.branch for s in every)
        if isinstance(roles, Mapping):
            _require("branch", list(roles), have_branches, self.family)
            wanted = [b for b in roles if branches is None or b in branches]
            chosen = [s for b in wanted for s in self.select([b], roles[b], layers)]
            return self._in_order(chosen, every)
        branches = have_branches if branches is None else list(branches)
        _require("branch", branches, have_branches, self.family)
        within = [s for s in every if s.branch in branches]
        have_roles = _ordered(s.role for s in within)
        roles = have_roles if roles is None else list(roles)
        _require("site", roles, have_roles, f"{self.family} in {', '.join(branches)}")
        chosen: list[Site] = []
        for branch in branches:
            wanted = _layer_numbers(layers, [s for s in within if s.branch == branch], branch)
            chosen += [
                s
                for s in within
                if s.branch == branch and s.role in roles and (wanted is None or s.layer in wanted)
            ]
        if not chosen:
            raise SiteError(
                f"no {', '.join(roles)} site in layers {layers!r} of {', '.join(branches)} "
                f"({self.family}): these roles have no layer number there. Use layers: all."
            )
        return self._in_order(chosen, every)

    @staticmethod
    def _in_order(chosen: list[Site], every: list[Site]) -> list[Site]:
        order = {s.path: i for i, s in enumerate(every)}
        return sorted(chosen, key=lambda s: order[s.path])


def reachable(model: nn.Module) -> Any:
    """The module whose methods can be called: DDP hides attributes, PeftModel forwards them."""
    return getattr(model, "module", model)


def forward_through(
    model: nn.Module, stock: nn.Module, compute: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """What `compute(*args, **kwargs)` returns, computed as one forward pass of `model`.

    Wrappers act on a forward pass: DistributedDataParallel makes ready to average gradients, PEFT
    and Accelerate (autocast) set up what they need. Calling the parts of `stock` past them would
    lose that; here they pass their call on to `stock`, which runs `compute` in place of its own
    forward.

    Args:
        model: `stock`, or what wraps it.
        stock: the unwrapped model.
        compute: calls parts of `stock`; returns tensors, or tuples or dicts of them.
        args: tensors, handed through the wrappers.
        kwargs: tensors, handed through the wrappers.
    """
    own = stock.__dict__.get("forward")
    stock.forward = compute
    try:
        return model(*args, **kwargs)
    finally:
        if own is None:
            del stock.forward
        else:
            stock.forward = own


def checkpoint_transformers(model: Any, enable: bool) -> bool:
    """Gradient checkpointing of a transformers model, on or off; returns True."""
    # transformers 5.20 renamed it, and warns at the old name.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if enable:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        # Only reentrant checkpoints need inputs with gradients, for which every layer would be
        # gone back through, down to the embeddings.
        model.disable_input_require_grads()
    else:
        getattr(model, f"{kind}_checkpointing_disable")()
    return True


def _ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _require(what: str, wanted: Sequence[str], have: Sequence[str], where: str) -> None:
    for name in wanted:
        if name not in have:
            hint = did_you_mean(name, have)
            raise SiteError(f"no {what} {name!r} on {where}; it has {', '.join(have)}.{hint}")


def _layer_numbers(layers: Any, sites: Sequence[Site], branch: str) -> set[int] | None:
    """The layer numbers meant by `layers` inside one branch; None means no restriction."""
    if layers == "all":
        return None
    have = sorted({s.layer for s in sites if s.layer is not None})
    count = len(have)
    if isinstance(layers, str):
        end, _, number = layers.partition(":")
        if end not in ("first", "last") or not number.isdigit() or int(number) < 1:
            raise SiteError(
                f"layers must be 'all', 'first:N', 'last:N' or a list of indices, got {layers!r}"
            )
        taken = min(int(number), count)
        return set(have[:taken] if end == "first" else have[count - taken :])
    wanted = set()
    for index in layers:
        if not -count <= index < count:
            raise SiteError(
                f"no layer {index} in {branch}: it has layers 0..{count - 1} "
                f"(or -{count}..-1 from the end)"
            )
        wanted.add(have[index])
    return wanted
