"""transformers' LlavaOnevisionForConditionalGeneration: images in tiles, SigLIP, and Qwen2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from mmtune.backbones.llava import Llava

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn


class LlavaOnevision(Llava):
    """LLaVA-OneVision that answers about single images.

    Branches: those of `Llava`. Images keep their shape: the stock processor gives the whole image,
    scaled to a square, and tiles of the image enlarged (`pixels`). Squares [b, 3, s, s] of the
    tower's size are read as the processor gives them: as a whole, and as the one tile.
    """

    family = "llava_onevision"
    summary = "transformers LlavaOnevisionForConditionalGeneration: images in tiles; VQA, dialogue"
    reads_sizes: ClassVar[bool] = True

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        name = "LlavaOnevisionForConditionalGeneration"
        return any(c.__name__ == name for c in type(model).__mro__)

    @property
    def turn(self) -> str:
        return "<|im_start|>user <image>\n{}<|im_end|><|im_start|>assistant\n"

    def counts(self, sizes: Tensor | None, images: int) -> list[int]:
        """As many as the model's own packing leaves of each image's tiles."""
        import torch

        config, inner = self._model.config, self._model.model
        if sizes is None:
            sizes = self._square().expand(images, 2)
        patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        known: dict[tuple[int, int], int] = {}
        for size in map(tuple, sizes.tolist()):
            if size not in known:
                tiles = torch.empty(self._tiles(list(size)), patches, 1, device="meta")
                line = torch.empty(1, device="meta")
                packed, _ = inner.pack_image_features(
                    [tiles], [list(size)], line, config.vision_aspect_ratio
                )
                known[size] = len(packed[0])
        return [known[size[0], size[1]] for size in sizes.tolist()]

    def pixels(self, processor: Any, images: Sequence[Image]) -> dict[str, Tensor]:
        """Tiles [k, n, 3, s, s], zero-padded, and heights and widths [k, 2] in pixels."""
        found = processor(images=list(images), return_tensors="pt")
        return {name: found[name] for name in ("pixel_values", "image_sizes")}

    def image_tokens(
        self, stock: Any, pixel_values: Tensor, image_sizes: Tensor | None = None
    ) -> Sequence[Tensor]:
        import torch

        if image_sizes is None:
            image_sizes = self._square().expand(len(pixel_values), 2)
            pixel_values = torch.stack([pixel_values, pixel_values], dim=1)
        found = stock.get_image_features(pixel_values, image_sizes.tolist(), return_dict=True)
        return list(found.pooler_output)

    def _tiles(self, size: list[int]) -> int:
        """How many the processor makes of an image of this height and width, the whole included."""
        from transformers.models.llava_onevision import modeling_llava_onevision as source

        config: Any = self._model.config
        return source.image_size_to_num_patches(
            size, config.image_grid_pinpoints, config.vision_config.image_size
        )

    def _square(self) -> Tensor:
        """Height and width of a square of the tower's size.

        Raises:
            ValueError: the processor would enlarge such a square.
        """
        import torch

        side = self._model.config.vision_config.image_size
        if self._tiles([side, side]) != 2:
            raise ValueError(
                f"image_grid_pinpoints of this model lack [{side}, {side}], so that squares of "
                f"{side} pixels would be enlarged; give images through Generative.pixels"
            )
        return torch.tensor([side, side])
