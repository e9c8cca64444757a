"""transformers' LlavaForConditionalGeneration: a CLIP or SigLIP tower and a decoder-only LM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmtune.backbones import mllm_generation
from mmtune.backbones.base import Site, checkpoint_transformers
from mmtune.backbones.generation import joined
from mmtune.backbones.interleaved import Interleaved
from mmtune.backbones.language import language_sites, language_trunk
from mmtune.backbones.towers import HF_LAYER, single_sites, sites_of_layer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmtune.backbones.generation import Decoding
    from mmtune.backbones.trunks import Trunk


# Kind of language model -> how a turn of its user is put; others are spoken to as Vicuna is.
TURNS = {
    "qwen2": "<|im_start|>user <image>\n{}<|im_end|>\n<|im_start|>assistant\n",
    "mistral": "[INST] <image>\n{} [/INST]",
}
VICUNA = "USER: <image>\n{} ASSISTANT:"


class Llava(Interleaved):
    """LLaVA that answers about images.

    Branches: `vision`, `projector` (its two Linears, both head), `language` (Llama, Mistral, Qwen2:
    models with Llama's module names). The projector reads an inner layer of the vision tower
    (`vision_feature_layer`, the last but one by default): the layers behind it change nothing and
    are no sites.
    """

    family = "llava"
    summary = "transformers LlavaForConditionalGeneration: LLaVA-1.5 and its kin; VQA, dialogue"
    place = "<image>\n"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return any(c.__name__ == "LlavaForConditionalGeneration" for c in type(model).__mro__)

    def iter_sites(self) -> Iterator[Site]:
        m, tower = self._model, self._tower()
        vision, language = m.config.vision_config.hidden_size, m.config.text_config.hidden_size
        if tower is not None:
            embed = [f"{tower}.embeddings.patch_embedding"]
            yield from single_sites(m, "vision", "embed", embed, vision)
            yield from single_sites(m, "vision", "norm", [f"{tower}.pre_layrnorm"], vision)
            for index in range(self._layers_read()):
                path = f"{tower}.encoder.layers.{index}"
                yield from sites_of_layer(m, "vision", index, path, HF_LAYER, vision)
        for name in ("linear_1", "linear_2"):
            path = f"model.multi_modal_projector.{name}"
            yield Site("projector", 0, "head", path, m.get_submodule(path), language)
        yield from language_sites(m, "model.language_model")
        yield from single_sites(m, "language", "head", ["lm_head"], language)

    def trunks(self) -> dict[str, Trunk]:
        """Vision and language; the projector maps each token by itself and has no trunk."""
        m, tower = self._model, self._tower()
        found: dict[str, Trunk] = {}
        if tower is not None:
            found["vision"] = self._vision_trunk(tower)
        return found | {"language": language_trunk(m, "model.language_model")}

    @property
    def turn(self) -> str:
        config = self._model.config
        own = getattr(config, "user_turn", None)  # a checkpoint may say how it was spoken to
        return own or TURNS.get(config.text_config.model_type, VICUNA)

    @property
    def placeholder(self) -> int:
        return self._model.config.image_token_id

    @property
    def ends(self) -> list[int]:
        return mllm_generation.ends_of(self._model)

    @property
    def packs(self) -> int | None:
        """Where attention takes any mask, and no window of its own is put over it."""
        from mmtune.backbones.attention import IMPLEMENTATION

        text = self._model.config.text_config
        masks = text._attn_implementation in ("sdpa", IMPLEMENTATION)
        windowed = getattr(text, "sliding_window", None) is not None
        return self.placeholder if masks and not windowed else None

    @property
    def packs_writing(self) -> bool:
        return mllm_generation.likeliest_alone(self._model)

    def image_tokens(
        self, stock: Any, pixel_values: Tensor, image_sizes: Tensor | None = None
    ) -> Sequence[Tensor]:
        return list(stock.get_image_features(pixel_values, return_dict=True).pooler_output)

    def continued(
        self, stock: Any, context: Mapping[str, Tensor], target_ids: Tensor, target_mask: Tensor
    ) -> Tensor:
        states = self._states(stock, context, target_ids, target_mask)
        return stock.lm_head(states[:, -target_ids.shape[1] :])

    def everywhere(
        self, stock: Any, context: Mapping[str, Tensor], target_ids: Tensor, target_mask: Tensor
    ) -> Tensor:
        return stock.lm_head(self._states(stock, context, target_ids, target_mask))

    def _states(
        self, stock: Any, context: Mapping[str, Tensor], target_ids: Tensor, target_mask: Tensor
    ) -> Tensor:
        inputs = joined(context, stock.get_input_embeddings(), target_ids, target_mask)
        return stock.model.language_model(**inputs, use_cache=False).last_hidden_state

    def written(self, stock: Any, context: Mapping[str, Tensor], decoding: Decoding) -> Tensor:
        arguments = decoding.arguments(self.ends, self.pad)
        return mllm_generation.written(stock, context, arguments)

    def counts(self, sizes: Tensor | None, images: int) -> list[int]:
        config = self._model.config
        vision, tower = config.vision_config, self._model.model.vision_tower
        root = getattr(tower, "vision_model", tower)
        with_class = hasattr(root.embeddings, "class_embedding")
        cropped = config.vision_feature_select_strategy == "default"
        return images * [(vision.image_size // vision.patch_size) ** 2 + with_class - cropped]

    def set_gradient_checkpointing(self, enable: bool = True) -> bool:
        return checkpoint_transformers(self.model, enable)

    @property
    def _model(self) -> Any:
        return self.model

    def _tower(self) -> str | None:
        """Path of the vision transformer; None where it is of a kind without known sites."""
        path = "model.vision_tower"
        tower = self._model.get_submodule(path)
        if hasattr(tower, "vision_model"):  # earlier versions of transformers 5
            path, tower = f"{path}.vision_model", tower.vision_model
        layers = getattr(getattr(tower, "encoder", None), "layers", None)
        known = layers is not None and hasattr(getattr(layers[0], "self_attn", None), "q_proj")
        return path if known else None

    def _layers_read(self) -> int:
        """How many vision layers, counted from the input, the projector's features pass through."""
        config = self._model.config
        read, count = config.vision_feature_layer, config.vision_config.num_hidden_layers
        # Entry i of the count + 1 hidden states has passed through i layers.
        return max(range(count + 1)[i] for i in ([read] if isinstance(read, int) else read))

    def _vision_trunk(self, tower: str) -> Trunk:
        from mmtune.backbones.mllm_trunks import FeatureTrunk

        m = self._model
        root: Any = m.get_submodule(tower)
        return FeatureTrunk(
            "vision",
            f"{tower}.encoder",
            root.encoder,
            width=m.config.vision_config.hidden_size,
            start=int(hasattr(root.embeddings, "class_embedding")),
            exit=m.model.multi_modal_projector,
            cropped=int(m.config.vision_feature_select_strategy == "default"),
        )
