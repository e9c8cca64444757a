"""open_clip's CLIP and CustomTextCLIP, with open_clip or timm vision transformers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from mmtune.backbones.base import Backbone, PairEmbeddings, Site, SiteError, reachable
from mmtune.backbones.towers import LayerNames, layer_sites, single_sites

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmtune.backbones.trunks import Trunk

RESBLOCK = LayerNames(
    roles={
        "attention": "attn",
        "q": "attn.q",
        "k": "attn.k",
        "v": "attn.v",
        "out": "attn.out",
        "mlp": "mlp",
        "fc1": "mlp.c_fc",
        "fc2": "mlp.c_proj",
    },
    norms=("ln_1", "ln_2"),
)
TIMM_BLOCK = LayerNames(
    roles={
        "attention": "attn",
        "q": "attn.q",
        "k": "attn.k",
        "v": "attn.v",
        "out": "attn.out",
        "mlp": "mlp",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    },
    norms=("norm1", "norm2"),
)


class OpenClip(Backbone):
    """open_clip's two-tower models.

    Vision towers: VisionTransformer, and timm vision transformers with a fused qkv (SigLIP's). Text
    towers: CLIP's own and TextTransformer. Others (ResNet, HF text models) have no sites, and
    selecting their branch says so.
    """

    family = "open_clip"
    summary = "open_clip CLIP and CustomTextCLIP with ViT towers, their own or timm's"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        names = {f"{c.__module__}.{c.__name__}" for c in type(model).__mro__}
        return bool(names & {"open_clip.model.CLIP", "open_clip.model.CustomTextCLIP"})

    def prepare(self) -> None:
        from mmtune.backbones.projections import split

        super().prepare()
        for path, _ in self._towers().values():
            for block in self.model.get_submodule(path).children():
                split(block, "attn")

    def restore(self) -> None:
        from mmtune.backbones.projections import restore

        super().restore()
        restore(self.model)

    def iter_sites(self) -> Iterator[Site]:
        m, towers = self.model, self._towers()
        if not towers:
            raise SiteError(
                f"{type(m).__name__} with {type(_visual(m)).__name__} has no transformer tower "
                "that this toolkit knows; use a ViT model"
            )
        self._require_prepared(towers)
        text = "text." if hasattr(m, "text") else ""
        outside = {
            "vision": {
                "embed": ["visual.conv1", "visual.trunk.patch_embed.proj"],
                "norm": ["visual.ln_pre", "visual.ln_post", "visual.trunk.norm"],
                "head": ["visual.head.proj"],
            },
            "text": {
                "embed": [f"{text}token_embedding"],
                "norm": [f"{text}ln_final"],
                "head": [f"{text}text_projection"],
            },
        }
        for branch, (path, names) in towers.items():
            first: Any = next(m.get_submodule(path).children())
            width = int(first.get_submodule(names.norms[0]).weight.shape[0])
            yield from single_sites(m, branch, "embed", outside[branch]["embed"], width)
            yield from layer_sites(m, branch, path, names, width)
            for role in ("norm", "head"):
                yield from single_sites(m, branch, role, outside[branch][role], width)

    def set_gradient_checkpointing(self, enable: bool = True) -> bool:
        model: Any = self.model
        for path, _ in self._towers().values():
            block: Any = next(model.get_submodule(path).children())
            # open_clip 3.3.0 checkpoints every residual block with the arguments of a
            # cross-attention one, which its custom block does not take.
            custom = type(block).__name__ == "CustomResidualAttentionBlock"
            if custom and len(inspect.signature(block.forward).parameters) < 4:
                return False
        model.set_grad_checkpointing(enable)
        return True

    def encode_image(self, model: nn.Module, pixel_values: Tensor) -> Tensor:
        return reachable(model).encode_image(pixel_values, normalize=True)

    def encode_text(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        return reachable(model).encode_text(input_ids, normalize=True)

    def embed_pairs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> PairEmbeddings:
        out = model(image=batch["pixel_values"], text=batch["input_ids"])
        if isinstance(out, dict):
            parts = [out[k] for k in ("image_features", "text_features", "logit_scale")]
            return PairEmbeddings(*parts, bias=out.get("logit_bias"))
        return PairEmbeddings(*out)

    def trunks(self) -> dict[str, Trunk]:
        from mmtune.backbones.trunks import Trunk

        m: Any = self.model
        found: dict[str, Trunk] = {}
        for branch, (path, names) in self._towers().items():
            if branch == "text":
                tower = m.text if hasattr(m, "text") else m
                found[branch] = Trunk(
                    branch,
                    path.removesuffix(".resblocks"),
                    tower.transformer,
                    width=tower.ln_final.weight.shape[0],
                    start=1,
                    context=tower.positional_embedding.shape[0],
                    causal=tower.attn_mask is not None,
                    hidden="x",
                    mask="attn_mask",
                    embed=partial(_embedded, tower),
                )
            elif names is RESBLOCK:
                width = m.visual.positional_embedding.shape[-1]
                trunk = m.visual.transformer
                found[branch] = Trunk(
                    branch, "visual.transformer", trunk, width, start=1, hidden="x"
                )
            else:
                # Checkpointing calls the blocks one by one: tokens enter before the norm ahead of
                # them and leave before the norm behind them, which are always called.
                trunk = m.visual.trunk
                found[branch] = Trunk(
                    branch,
                    "visual.trunk.norm_pre",
                    trunk.norm_pre,
                    width=trunk.embed_dim,
                    start=trunk.num_prefix_tokens,
                    hidden="x",
                    exit=trunk.norm,
                )
        return found

    def _towers(self) -> dict[str, tuple[str, LayerNames]]:
        """Branch -> (path of its layers, names inside a layer)."""
        m = self.model
        found: dict[str, tuple[str, LayerNames]] = {}
        visual = _visual(m)
        if hasattr(visual, "transformer"):
            found["vision"] = ("visual.transformer.resblocks", RESBLOCK)
        elif hasattr(getattr(visual, "trunk", None), "blocks"):
            from mmtune.backbones.projections import Split

            attention = getattr(next(visual.trunk.blocks.children()), "attn", None)
            if hasattr(attention, "qkv") or isinstance(attention, Split):
                found["vision"] = ("visual.trunk.blocks", TIMM_BLOCK)
        text = "text." if hasattr(m, "text") else ""
        holder: Any = m.text if text else m
        if hasattr(getattr(holder, "transformer", None), "resblocks"):
            found["text"] = (f"{text}transformer.resblocks", RESBLOCK)
        return found

    def _require_prepared(self, towers: Mapping[str, tuple[str, LayerNames]]) -> None:
        from mmtune.backbones.projections import Split

        for path, _ in towers.values():
            first: Any = next(self.model.get_submodule(path).children())
            if not isinstance(first.attn, Split):
                raise SiteError(
                    f"{path} still holds fused attention, whose q, k, v are no modules: "
                    "call backbone.prepare() first"
                )


def _embedded(tower: Any, ids: Tensor) -> Tensor:
    """Token and position embeddings [n, d] of ids [n] behind the begin token."""
    return tower.token_embedding(ids) + tower.positional_embedding[1 : 1 + len(ids)]


def _visual(model: nn.Module) -> Any:
    return model.visual
