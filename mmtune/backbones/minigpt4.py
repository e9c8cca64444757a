"""MiniGPT-4: BLIP-2's ViT and Q-Former, one Linear, and Vicuna, in BLIP-2's stock class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmtune.backbones import mllm_generation
from mmtune.backbones.blip2 import Blip2
from mmtune.backbones.interleaved import IMAGE, Interleaved

if TYPE_CHECKING:
    from torch import Tensor, nn

PLACE = f"<Img>{IMAGE}</Img> "
TURN = f"###Human: {PLACE}{{}} ###Assistant:"


class MiniGPT4(Interleaved, Blip2):
    """MiniGPT-4 that answers and captions: Blip2ForConditionalGeneration with a Llama.

    Branches: those of `Blip2`. The learned queries stand among the words of the prompt, where
    BLIP-2 puts them first. `mmtune convert minigpt4` makes such a folder of published weights.

    Source: MiniGPT-4, arXiv 2304.10592; the template and how the words around the image are cut
    into tokens are those of its released code.
    """

    family = "minigpt4"
    summary = "MiniGPT-4 as Blip2ForConditionalGeneration with a Llama; VQA, captions, dialogue"
    place = PLACE
    asked = "{question}"
    captioned = "Describe this image in detail."

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        config: Any = getattr(model, "config", None)
        return Blip2.matches(model) and config.text_config.model_type == "llama"

    @property
    def turn(self) -> str:
        return TURN

    @property
    def placeholder(self) -> int:
        return self._model.config.image_token_id

    @property
    def ends(self) -> list[int]:
        return mllm_generation.ends_of(self._model)

    def counts(self, sizes: Tensor | None, images: int) -> list[int]:
        return images * [self._model.config.num_query_tokens]

    def rows(self, tokenizer: Any, texts: Sequence[str], counts: Sequence[int]) -> list[list[int]]:
        """What stands before the image and what stands behind it are cut into tokens apart."""
        found = []
        for text, count in zip(texts, counts, strict=True):
            before, _, after = text.partition(IMAGE)
            first = tokenizer(before)["input_ids"]
            last = tokenizer(after, add_special_tokens=False)["input_ids"]
            found.append([*first, *count * [self.placeholder], *last])
        return found
