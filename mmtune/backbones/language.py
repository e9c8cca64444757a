"""Sites and trunks of the language models inside multimodal ones: OPT, T5, and Llama's layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmtune.backbones.base import Site, SiteError
from mmtune.backbones.towers import LayerNames, single_sites, sites_of_layer

if TYPE_CHECKING:
    from torch import nn

    from mmtune.backbones.mllm_trunks import LanguageTrunk

OPT_LAYER = LayerNames(
    roles={
        "attention": "self_attn",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "out": "self_attn.out_proj",
        "fc1": "fc1",
        "fc2": "fc2",
    },
    norms=("self_attn_layer_norm", "final_layer_norm"),
)
# fc2(act(gate(x)) * fc1(x)): `gate` is a weight of its own beside fc1. k and v of grouped-query
# attention are narrower than the layer.
LLAMA_LAYER = LayerNames(
    roles={
        "attention": "self_attn",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "out": "self_attn.o_proj",
        "mlp": "mlp",
        "gate": "mlp.gate_proj",
        "fc1": "mlp.up_proj",
        "fc2": "mlp.down_proj",
    },
    norms=("input_layernorm", "post_attention_layernorm"),
)


@dataclass(frozen=True)
class LanguageLayout:
    """Where a kind of language model keeps its parts; paths are relative to the model.

    Attributes:
        stacks: (path of the layers, names inside a layer), in forward order; layer numbers run on
            from one stack to the next.
        embed: token embedding.
        norms: norms outside the layers.
        trunk: the module that takes token embeddings and a mask [b, t].
        causal: whether the trunk's tokens see only those before them.
    """

    stacks: tuple[tuple[str, LayerNames], ...]
    embed: str
    norms: tuple[str, ...]
    trunk: str
    causal: bool = True


def layout_of(language_model: nn.Module) -> LanguageLayout:
    """The layout of a language model, told by the names of its modules.

    T5's layers are numbered encoder first: with 24 in each stack, decoder layer 0 is number 24.

    Raises:
        SiteError: a language model of another kind.
    """
    lm: Any = language_model
    if hasattr(lm, "encoder") and hasattr(lm.encoder, "block"):
        gated = hasattr(lm.encoder.block[0].layer[-1].DenseReluDense, "wi_0")
        return LanguageLayout(
            stacks=(
                ("encoder.block", _t5_layer(gated, decoder=False)),
                ("decoder.block", _t5_layer(gated, decoder=True)),
            ),
            embed="shared",
            norms=("encoder.final_layer_norm", "decoder.final_layer_norm"),
            trunk="encoder",
            causal=False,
        )
    decoder = getattr(getattr(lm, "model", None), "decoder", None)
    if hasattr(decoder, "embed_positions"):
        root = "model.decoder"
        return LanguageLayout(
            stacks=((f"{root}.layers", OPT_LAYER),),
            embed=f"{root}.embed_tokens",
            norms=(f"{root}.final_layer_norm",),
            trunk=root,
        )
    root, inner = ("model.", lm.model) if hasattr(lm, "model") else ("", lm)
    layers = getattr(inner, "layers", None)
    if layers is not None and hasattr(getattr(layers[0], "mlp", None), "up_proj"):
        return LanguageLayout(
            stacks=((f"{root}layers", LLAMA_LAYER),),
            embed=f"{root}embed_tokens",
            norms=(f"{root}norm",),
            trunk=root.removesuffix("."),
        )
    raise SiteError(
        f"no sites are known in a {type(lm).__name__}: expected OPT, T5, or a decoder with Llama's "
        "module names (self_attn.q_proj, mlp.gate_proj; Llama, Mistral, Qwen)"
    )


def _t5_layer(gated: bool, decoder: bool) -> LayerNames:
    """A T5 block: self-attention, in the decoder cross-attention, then the MLP."""
    attention, cross = "layer.0.SelfAttention", "layer.1.EncDecAttention"
    roles = {"attention": attention}
    roles |= {r: f"{attention}.{n}" for r, n in zip(("q", "k", "v", "out"), "qkvo", strict=True)}
    if decoder:
        roles["cross_attention"] = cross
        crossed = ("cross_q", "cross_k", "cross_v", "cross_out")
        roles |= {r: f"{cross}.{n}" for r, n in zip(crossed, "qkvo", strict=True)}
    last = 2 if decoder else 1
    mlp = f"layer.{last}.DenseReluDense"
    roles["mlp"] = mlp
    roles |= {"gate": f"{mlp}.wi_0", "fc1": f"{mlp}.wi_1"} if gated else {"fc1": f"{mlp}.wi"}
    roles["fc2"] = f"{mlp}.wo"
    return LayerNames(roles, norms=tuple(f"layer.{i}.layer_norm" for i in range(last + 1)))


def language_sites(model: nn.Module, path: str) -> Iterator[Site]:
    """Sites of the language model at `path`, without its head."""
    lm: Any = model.get_submodule(path)
    layout, width = layout_of(lm), int(lm.config.hidden_size)
    yield from single_sites(model, "language", "embed", [f"{path}.{layout.embed}"], width)
    index = 0
    for stack, names in layout.stacks:
        for number, _ in enumerate(lm.get_submodule(stack).children()):
            layer = f"{path}.{stack}.{number}"
            yield from sites_of_layer(model, "language", index, layer, names, width)
            index += 1
    norms = [f"{path}.{norm}" for norm in layout.norms]
    yield from single_sites(model, "language", "norm", norms, width)


def language_trunk(model: nn.Module, path: str, grids: bool = False) -> LanguageTrunk:
    """Where virtual tokens enter the language model at `path` (T5: its encoder).

    Args:
        model: the stock model.
        path: of the language model in it.
        grids: whether an image's tokens have positions in time, height and width.
    """
    from mmtune.backbones.mllm_trunks import GridTrunk, LanguageTrunk

    lm: Any = model.get_submodule(path)
    layout = layout_of(lm)
    module: Any = lm.get_submodule(layout.trunk)
    embedding: Any = lm.get_submodule(layout.embed)
    kind = GridTrunk if grids else LanguageTrunk
    return kind(
        "language",
        f"{path}.{layout.trunk}".removesuffix("."),
        module,
        width=int(embedding.embedding_dim),
        context=getattr(lm.config, "max_position_embeddings", None),
        causal=layout.causal,
        mask="attention_mask",
        embed=embedding,
    )
