"""How near pictures are to texts and to one another, by a CLIP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mmtune.data.texts import report_too_long

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class ImageScorer:
    """Embeds pictures and texts into one space.

    Args:
        name: for `mmtune.backbones.load`, such as open_clip:ViT-B-32/openai or zoo:tiny-clip.
        dtype: of the weights.
        device: where it runs.
        batch_size: pictures or texts computed at once.

    Raises:
        ValueError: it cannot be loaded, or does not embed both.
    """

    def __init__(
        self, name: str, dtype: str = "float32", device: str = "cpu", batch_size: int = 64
    ) -> None:
        from mmtune import backbones
        from mmtune.data.transforms import EvalTransform

        self.name, self.device, self.batch_size = name, device, batch_size
        self.loaded = backbones.load(name, dtype)
        self.loaded.model.to(device).eval()
        self.dtype = next(self.loaded.model.parameters()).dtype
        self.transform = EvalTransform(self.loaded.image)
        try:
            self.texts(["a photo"])
        except (NotImplementedError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name} does not embed images and texts in one space ({error}); a filter needs a "
                "CLIP, such as open_clip:ViT-B-32/openai or zoo:tiny-clip"
            ) from None

    def prepared(self, picture: Image) -> Tensor:
        """Pixels as the model reads them, [3, s, s]."""
        return self.transform(picture)

    def images(self, pixels: Iterator[Tensor]) -> Tensor:
        """[n, e] unit vectors on the CPU, of prepared pictures that may still be on their way."""
        import torch

        found, some = [], []
        encode = self.loaded.backbone.encode_image
        with torch.no_grad():
            for one in pixels:
                some.append(one)
                if len(some) == self.batch_size:
                    batch = torch.stack(some).to(self.device, self.dtype)
                    found, some = [*found, encode(self.loaded.model, batch)], []
            if some:
                batch = torch.stack(some).to(self.device, self.dtype)
                found.append(encode(self.loaded.model, batch))
            return torch.cat(found).float().cpu() if found else torch.empty(0, 0)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """[n, e] unit vectors on the CPU; what is too long is cut off, and logged."""
        import torch

        report_too_long(texts, self.loaded.count_tokens, self.loaded.context_length)
        found = []
        for start in range(0, len(texts), self.batch_size):
            tokens = self.loaded.tokenize(texts[start : start + self.batch_size])
            moved = {key: value.to(self.device) for key, value in tokens.items()}
            with torch.no_grad():
                found.append(self.loaded.backbone.encode_text(self.loaded.model, **moved))
        return torch.cat(found).float().cpu() if found else torch.empty(0, 0)
