"""Models that write text after a prompt in which the image stands among the words."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from mmtune.backbones.generation import padded
from mmtune.backbones.generative import Generative

if TYPE_CHECKING:
    from torch import Tensor

IMAGE = "<image>"  # where the image stands in a prompt
SHORTLY = "{question}\nAnswer the question using a single word or phrase."
CAPTION = "Provide a one-sentence caption for the provided image."


class Interleaved(Generative):
    """A decoder-only model whose image stands among the words of its prompt.

    A text marks the image's place with <image>; `prompts` puts as many placeholders there as the
    image has tokens, and `read` puts the image's tokens in the place of the placeholders.

    Attributes:
        place: the mark with what belongs to it in a turn, such as the line break behind it.
        asked: how a question is put, with {question} in it.
        captioned: how a caption is asked for.
    """

    place: ClassVar[str] = IMAGE
    asked: ClassVar[str] = SHORTLY
    captioned: ClassVar[str] = CAPTION

    @property
    @abstractmethod
    def turn(self) -> str:
        """A user's turn and the beginning of the answer: `place`, and {} for the user's words."""

    @property
    @abstractmethod
    def placeholder(self) -> int:
        """The id that holds an image token's place."""

    @abstractmethod
    def counts(self, sizes: Tensor | None, images: int) -> list[int]:
        """How many tokens each image has.

        Args:
            sizes: [k, 2] as `pixels` gives them; None for squares.
            images: k.
        """

    @property
    def templates(self) -> Mapping[str, str]:
        return {
            "question": self.turn.format(self.asked),
            "text": self.turn.replace(self.place, "").format(self.asked),
            "caption": self.turn.format(self.captioned),
        }

    def prompts(
        self,
        tokenizer: Any,
        texts: Sequence[str],
        limit: int | None = None,
        sizes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Prompts with as many placeholders as the image has tokens; they are never cut.

        Raises:
            ValueError: a text without exactly one <image>.
        """
        wrong = next((t for t in texts if t.count(IMAGE) != 1), None)
        if wrong is not None:
            raise ValueError(
                f"a prompt must hold {IMAGE} once, where the image stands; got {wrong!r:.120}. "
                "Set task.prompt accordingly."
            )
        rows = self.rows(tokenizer, texts, self.counts(sizes, len(texts)))
        ids, mask = padded(rows, self.pad, left=True)
        found = {"input_ids": ids, "attention_mask": mask}
        return found if sizes is None else found | {"image_sizes": sizes}

    def rows(self, tokenizer: Any, texts: Sequence[str], counts: Sequence[int]) -> list[list[int]]:
        """The ids of each text, with `counts` placeholders where its image stands."""
        token = tokenizer.convert_ids_to_tokens(self.placeholder)
        pairs = zip(texts, counts, strict=True)
        return tokenizer([t.replace(IMAGE, self.marks(token * n)) for t, n in pairs])["input_ids"]

    def marks(self, placeholders: str) -> str:
        """Placeholders with what the family puts around an image."""
        return placeholders

    def text_prompts(self, tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts as they are.

        Raises:
            ValueError: a text with an <image>.
        """
        wrong = next((t for t in texts if IMAGE in t), None)
        if wrong is not None:
            raise ValueError(f"a prompt without an image must hold no {IMAGE}, got {wrong!r:.120}")
        ids, mask = padded(tokenizer(list(texts))["input_ids"], self.pad, left=True)
        return {"input_ids": ids, "attention_mask": mask}

    def prefaced(self, prompt: str, preface: str) -> str:
        """Behind the image, or else behind what opens the user's turn."""
        opening = self.turn.partition(self.place)[0]
        for mark in (self.place, IMAGE):
            before, found, after = prompt.partition(mark)
            if found:
                return before + found + preface + after
        if prompt.startswith(opening):
            return opening + preface + prompt.removeprefix(opening)
        return preface + prompt

    def read(
        self,
        stock: Any,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_sizes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        import torch

        words = stock.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return {"embeds": words, "mask": attention_mask}
        found = self.image_tokens(stock, pixel_values, image_sizes)
        image = torch.cat(list(found)).to(words)
        return {"embeds": self.filled(words, input_ids, image), "mask": attention_mask}

    def filled(self, words: Tensor, input_ids: Tensor, image: Tensor) -> Tensor:
        """The embeddings of a prompt with the image's tokens [k, d] where placeholders stand.

        Raises:
            ValueError: other numbers of placeholders and tokens.
        """
        here = input_ids == self.placeholder
        if int(here.sum()) != len(image):
            raise ValueError(
                f"the prompts have {int(here.sum())} placeholders and the images {len(image)} "
                "tokens; make prompts with Generative.prompts, for images of these sizes"
            )
        return words.masked_scatter(here[..., None], image)
