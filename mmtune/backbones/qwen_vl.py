"""transformers' Qwen2-VL, Qwen2.5-VL and Qwen3-VL: a ViT for any image size, and Qwen2 or Qwen3."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from mmtune.backbones import mllm_generation
from mmtune.backbones.base import Site, SiteError, checkpoint_transformers
from mmtune.backbones.generation import joined, positions
from mmtune.backbones.interleaved import Interleaved
from mmtune.backbones.language import language_sites, language_trunk
from mmtune.backbones.towers import LayerNames, layer_sites, single_sites

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from mmtune.backbones.generation import Decoding
    from mmtune.backbones.trunks import Trunk

# Class -> what its published chat template says before the user's turn.
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
CLASSES = {
    "Qwen2VLForConditionalGeneration": SYSTEM,
    "Qwen2_5_VLForConditionalGeneration": SYSTEM,
    "Qwen3VLForConditionalGeneration": "",
}
TURN = "<|im_start|>user\n<image>{}<|im_end|>\n<|im_start|>assistant\n"
SIDE = 16  # tokens along the edge of a square image: 448 pixels with patches of 14, 512 of 16
VISION = "model.visual"
# Parts of a vision block and of a merger by the names that the three generations give them.
MLPS = (
    {"gate": "gate_proj", "fc1": "up_proj", "fc2": "down_proj"},
    {"fc1": "fc1", "fc2": "fc2"},
    {"fc1": "linear_fc1", "fc2": "linear_fc2"},
)
HEADS = (("mlp.0", "mlp.2"), ("linear_fc1", "linear_fc2"))


class QwenVL(Interleaved):
    """Qwen-VL that answers about images.

    Branches: `vision` (fused q, k, v shown as three Linears), `projector` (the merger's two
    Linears, both head; Qwen3-VL's deepstack mergers, which feed the first layers of the language
    model, come first), `language`. The vision tower packs the patches of all images into one row
    with windows in it, so virtual tokens cannot enter there: it has no trunk.

    Images keep their shape, as the stock processor resizes them (`pixels`); squares
    [b, 3, s, s] of 16 by 16 tokens are read as well.
    """

    family = "qwen_vl"
    summary = "transformers Qwen2-VL, Qwen2.5-VL, Qwen3-VL ...ForConditionalGeneration: VQA, chat"
    packed: ClassVar[tuple[str, ...]] = ("vision",)
    reads_sizes: ClassVar[bool] = True

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return any(c.__name__ in CLASSES for c in type(model).__mro__)

    def prepare(self) -> None:
        from mmtune.backbones.projections import split

        super().prepare()
        for block in self._model.model.visual.blocks:
            split(block.attn, "qkv")

    def restore(self) -> None:
        from mmtune.backbones.projections import restore

        super().restore()
        restore(self.model)

    def iter_sites(self) -> Iterator[Site]:
        m = self._model
        self._require_prepared()
        visual, language = m.model.visual, m.config.text_config.hidden_size
        names, width = _vision_layer(visual.blocks[0]), visual.blocks[0].norm1.weight.shape[0]
        yield from single_sites(m, "vision", "embed", [f"{VISION}.patch_embed.proj"], width)
        yield from layer_sites(m, "vision", f"{VISION}.blocks", names, width)
        extra = len(getattr(visual, "deepstack_merger_list", ()))
        mergers = [f"{VISION}.deepstack_merger_list.{i}" for i in range(extra)]
        for index, merger in enumerate([*mergers, f"{VISION}.merger"]):
            for part in _first(HEADS, m.get_submodule(merger)):
                path = f"{merger}.{part}"
                yield Site("projector", index, "head", path, m.get_submodule(path), language)
        yield from language_sites(m, "model.language_model")
        yield from single_sites(m, "language", "head", ["lm_head"], language)

    def trunks(self) -> dict[str, Trunk]:
        """The language model's alone."""
        return {"language": language_trunk(self._model, "model.language_model", grids=True)}

    @property
    def turn(self) -> str:
        kind = next(c.__name__ for c in type(self.model).__mro__ if c.__name__ in CLASSES)
        return CLASSES[kind] + TURN

    @property
    def placeholder(self) -> int:
        return self._model.config.image_token_id

    @property
    def ends(self) -> list[int]:
        return mllm_generation.ends_of(self._model)

    @property
    def square(self) -> int:
        """Pixels along the edge of a square image."""
        vision = self._model.config.vision_config
        return SIDE * vision.patch_size * vision.spatial_merge_size

    def counts(self, sizes: Tensor | None, images: int) -> list[int]:
        if sizes is None:
            return images * [SIDE**2]
        return (sizes.prod(-1) // self._model.config.vision_config.spatial_merge_size**2).tolist()

    def marks(self, placeholders: str) -> str:
        return f"<|vision_start|>{placeholders}<|vision_end|>"

    def pixels(self, processor: Any, images: Sequence[Image]) -> dict[str, Tensor]:
        """Patches [k, n, c] in the processor's order, zero-padded; rows and columns [k, 2]."""
        from torch.nn.utils.rnn import pad_sequence

        found = processor(images=list(images), return_tensors="pt")
        sizes = found["image_grid_thw"][:, 1:]
        rows = found["pixel_values"].split(sizes.prod(-1).tolist())
        return {"pixel_values": pad_sequence(list(rows), batch_first=True), "image_sizes": sizes}

    def read(
        self,
        stock: Any,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_sizes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Embeddings and mask; with an image positions [b, 3, t] too.

        In Qwen3-VL also `here` [b, t], where image tokens stand, and `deep` [b, l, t, d], what is
        added to the states that leave the first l layers.
        """
        import torch

        if pixel_values is None:
            return super().read(stock, None, input_ids, attention_mask)
        seen, grid = self._seen(stock, pixel_values, image_sizes)
        words, here = stock.get_input_embeddings()(input_ids), input_ids == self.placeholder
        image = torch.cat(list(seen.pooler_output)).to(words)
        embeds = self.filled(words, input_ids, image)
        places, _ = stock.model.get_rope_index(
            input_ids, here.int(), image_grid_thw=grid, attention_mask=attention_mask
        )
        context = {
            "embeds": embeds,
            "mask": attention_mask,
            "positions": places.transpose(0, 1),
        }
        deep = getattr(seen, "deepstack_features", None) or ()
        if deep:
            # Tensors, or one for each image, by the version of transformers.
            layers = [x if isinstance(x, torch.Tensor) else torch.cat(list(x)) for x in deep]
            empty = torch.zeros_like(words)
            whole = [empty.masked_scatter(here[..., None], layer.to(words)) for layer in layers]
            context |= {"here": here, "deep": torch.stack(whole, dim=1)}
        return context

    def image_tokens(
        self, stock: Any, pixel_values: Tensor, image_sizes: Tensor | None = None
    ) -> Sequence[Tensor]:
        return list(self._seen(stock, pixel_values, image_sizes)[0].pooler_output)

    @contextmanager
    def each_once(self, images: Sequence[int] | None) -> Iterator[None]:
        distinct = list(dict.fromkeys(images or ()))
        if images is None or len(distinct) == len(images):
            yield
            return
        own, order = self._seen, [distinct.index(i) for i in images]

        def seen(stock: Any, pixel_values: Tensor, sizes: Tensor | None) -> tuple[Any, Tensor]:
            few = None if sizes is None else sizes[distinct]
            found, grid = own(stock, pixel_values[distinct], few)
            tokens = list(found.pooler_output)
            counts = [len(image) for image in tokens]
            layers = [
                list(layer) if isinstance(layer, list | tuple) else layer.split(counts)
                for layer in getattr(found, "deepstack_features", None) or ()
            ]
            again = SimpleNamespace(
                pooler_output=[tokens[i] for i in order],
                deepstack_features=[[layer[i] for i in order] for layer in layers],
            )
            return again, grid[order]

        self._seen = seen
        try:
            yield
        finally:
            del self._seen

    def continued(
        self, stock: Any, context: Mapping[str, Tensor], target_ids: Tensor, target_mask: Tensor
    ) -> Tensor:
        states = self._states(stock, context, target_ids, target_mask)
        return stock.lm_head(states[:, -target_ids.shape[1] :])

    def everywhere(
        self, stock: Any, context: Mapping[str, Tensor], target_ids: Tensor, target_mask: Tensor
    ) -> Tensor:
        return stock.lm_head(self._states(stock, context, target_ids, target_mask))

    def written(self, stock: Any, context: Mapping[str, Tensor], decoding: Decoding) -> Tensor:
        arguments = decoding.arguments(self.ends, self.pad)
        with _told(stock, context):
            return mllm_generation.written(stock, context, arguments)

    def set_gradient_checkpointing(self, enable: bool = True) -> bool:
        return checkpoint_transformers(self.model, enable)

    @property
    def _model(self) -> Any:
        return self.model

    def _require_prepared(self) -> None:
        from mmtune.backbones.projections import Split

        if not isinstance(self._model.model.visual.blocks[0].attn.qkv, Split):
            raise SiteError(
                f"{VISION} still holds fused attention, whose q, k, v are no modules: call "
                "backbone.prepare() first"
            )

    def _states(
        self, stock: Any, context: Mapping[str, Tensor], target_ids: Tensor, target_mask: Tensor
    ) -> Tensor:
        inputs: dict[str, Any] = joined(
            context, stock.get_input_embeddings(), target_ids, target_mask
        )
        if "positions" in context:
            inputs |= _placed(context, inputs["attention_mask"], inputs["inputs_embeds"].shape[1])
        return stock.model.language_model(**inputs, use_cache=False).last_hidden_state

    def _seen(self, stock: Any, pixel_values: Tensor, sizes: Tensor | None) -> tuple[Any, Tensor]:
        """What the vision tower makes of images, and their grids [k, 3]."""
        import torch

        if sizes is None:
            vision = stock.config.vision_config
            patches = _cut(
                pixel_values,
                vision.patch_size,
                vision.spatial_merge_size,
                vision.temporal_patch_size,
            )
            side = pixel_values.shape[-1] // vision.patch_size
            sizes = torch.full((len(pixel_values), 2), side, device=pixel_values.device)
        else:
            lengths = sizes.prod(-1).tolist()
            patches = [row[:n] for row, n in zip(pixel_values, lengths, strict=True)]
        grid = torch.nn.functional.pad(sizes, (1, 0), value=1)
        found = stock.get_image_features(torch.cat(list(patches)), grid, return_dict=True)
        return found, grid


def _vision_layer(block: Any) -> LayerNames:
    roles = {"attention": "attn", **{role: f"attn.qkv.{role}" for role in "qkv"}}
    roles |= {"out": "attn.proj", "mlp": "mlp"}
    parts = next(p for p in MLPS if hasattr(block.mlp, p["fc1"]))
    return LayerNames(
        roles | {role: f"mlp.{name}" for role, name in parts.items()}, norms=("norm1", "norm2")
    )


def _first(candidates: Sequence[tuple[str, str]], module: nn.Module) -> tuple[str, str]:
    """The names that this module has."""
    names = dict(module.named_modules())
    return next(c for c in candidates if c[0] in names)


def _cut(pixels: Tensor, patch: int, merge: int, frames: int) -> Tensor:
    """Squares [b, c, s, s] as patches [b, n, c * frames * patch * patch], as the processor cuts.

    The patches that are merged into one token stand together; an image is its own next frame.
    """
    b, c, s, _ = pixels.shape
    n = s // (patch * merge)
    cut = pixels.reshape(b, c, n, merge, patch, n, merge, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
    cut = cut[:, :, :, :, :, :, None].expand(*cut.shape[:6], frames, patch, patch)
    return cut.reshape(b, (n * merge) ** 2, c * frames * patch * patch)


def _placed(
    context: Mapping[str, Tensor], mask: Tensor, new: int, first: bool = True
) -> dict[str, Any]:
    """What the language model is told, beside embeddings and mask, of the last `new` tokens.

    Words behind the prompt go on from its largest position.

    Args:
        context: of a prompt of p tokens, with positions [n, 3, p].
        mask: [n, s], of prompt and what follows it.
        new: tokens that are computed now.
        first: whether the prompt is among them.
    """
    import torch

    prompt = context["positions"]
    p = prompt.shape[-1]
    lead = prompt.amax((1, 2)) + 1 - context["mask"].sum(1)
    words = (positions(mask)[:, p:] + lead[:, None])[:, None].expand(-1, 3, -1)
    whole = torch.cat([prompt, words], dim=-1)
    told: dict[str, Any] = {"position_ids": whole[..., -new:].transpose(0, 1)}
    if "deep" in context and first:
        here = context["here"]
        told["visual_pos_masks"] = torch.nn.functional.pad(here, (0, new - p))
        told["deepstack_visual_embeds"] = [layer[here] for layer in context["deep"].unbind(1)]
    return told


@contextmanager
def _told(stock: Any, context: Mapping[str, Tensor]) -> Iterator[None]:
    """While it lasts, `generate` from embeddings knows an image's positions and deep features.

    It counts positions as of words, and its forward takes deep features from pixels alone.
    """
    if "positions" not in context:
        yield
        return
    from mmtune.backbones.attention import cache_of

    total = 0

    def tell(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal total
        b, new = kwargs["inputs_embeds"].shape[:2]
        cache, mask = cache_of(kwargs), kwargs.get("attention_mask")
        first = cache is None or int(cache.get_seq_length()) == 0
        total = new if first else total + new
        if mask is None:  # generate drops one without padding
            mask = context["mask"].new_ones(b, total)
        beams = b // len(context["mask"])
        rows = {name: value.repeat_interleave(beams, 0) for name, value in context.items()}
        return args, kwargs | _placed(rows, mask, new, first)

    deltas = stock.model.rope_deltas  # generate leaves its own behind
    module = stock.model.language_model
    handle = module.register_forward_pre_hook(tell, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        stock.model.rope_deltas = deltas
