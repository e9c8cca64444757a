"""Backbones that write text: answers, captions, and how likely a given text is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from mmtune.backbones import unwrapped
from mmtune.backbones.base import Backbone, PairEmbeddings, forward_through

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from mmtune.backbones.generation import Decoding

READ = ("pixel_values", "input_ids", "attention_mask")  # what `Generative.read` takes of a batch
SIZES = "image_sizes"  # and this, where a batch has it


class Generative(Backbone):
    """A backbone that writes text. It embeds no pairs, and its pair methods say so.

    What a text goes on from is read once and may serve several texts: `read` gives the context of b
    prompts, `continued` scores target texts after it, `written` writes new ones. These three take
    the stock model and call its parts; a training step goes through `target_logits`.

    Attributes:
        instead: what to use for retrieval, completing "... embeds no pairs; for retrieval use".
        reads_videos: whether `read` takes frames, [b, f, 3, s, s].
        reads_sizes: whether the stock processor keeps an image's size or shape; `pixels` then gives
            what it makes of images. Squares [b, 3, s, s] can be read in any case.
    """

    instead: ClassVar[str] = "a CLIP, SigLIP or open_clip model"
    reads_videos: ClassVar[bool] = False
    reads_sizes: ClassVar[bool] = False

    @property
    def writes(self) -> bool:
        """Whether this model has a decoder; a family may have classes without."""
        return True

    @property
    def templates(self) -> Mapping[str, str]:
        """Prompts by task: `question` with {question} in it, and `caption`.

        Families that take prompts without an image also say `text`, with {question} in it.
        """
        return {"question": "{question}", "caption": ""}

    @property
    @abstractmethod
    def ends(self) -> list[int]:
        """Ids of the tokens that end a text; the first ends a target."""

    @property
    def pad(self) -> int:
        """The id that fills up rows; masks tell padding from tokens."""
        config: Any = self.model.config
        found = config.text_config.pad_token_id
        return self.ends[0] if found is None else int(found)

    @abstractmethod
    def prompts(
        self,
        tokenizer: Any,
        texts: Sequence[str],
        limit: int | None = None,
        sizes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Texts (templates filled in) as {input_ids [b, t], attention_mask [b, t]} on the CPU.

        With them, image_sizes where `sizes` are given: all that `read` takes beside the pixels.

        Args:
            tokenizer: of the model.
            texts: one for each image; a family whose image has a place among the words marks it
                with <image>.
            limit: tokens at most, where a longer text may lose its end.
            sizes: [b, 2] of the images, as `pixels` gives them; None for squares.
        """

    def pixels(self, processor: Any, images: Sequence[Image]) -> dict[str, Tensor]:
        """RGB images as the stock processor gives them to the model.

        Args:
            processor: the image processor of the model.
            images: k of any size.

        Returns:
            {pixel_values [k, ...], image_sizes [k, 2]}, which only this family understands.

        Raises:
            TypeError: this family reads squares alone.
        """
        raise TypeError(f"{type(self.model).__name__} reads square images alone")

    def text_prompts(self, tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
        """The same for prompts that no image goes with; `read` is then given no pixels.

        Raises:
            TypeError: this family reads every text with an image.
        """
        raise TypeError(
            f"{type(self.model).__name__} reads every text with an image: a question without one "
            "cannot be asked"
        )

    def prefaced(self, prompt: str, preface: str) -> str:
        """A prompt (template filled in) with a text put where the user's words begin."""
        return preface + prompt

    def targets(
        self, tokenizer: Any, texts: Sequence[str], limit: int | None = None, after: str = ""
    ) -> dict[str, Tensor]:
        """Texts to be written as {target_ids [n, t], target_mask [n, t]}, with their end tokens.

        Args:
            tokenizer: of the model.
            texts: without begin and end.
            limit: tokens at most, the end included; longer ones are cut.
            after: a prompt that they follow; only its last character matters.
        """
        from mmtune.backbones.generation import after_prompt, padded

        spaced = [after_prompt(tokenizer, after, text) for text in texts]
        rows = tokenizer(spaced, add_special_tokens=False)["input_ids"] if spaced else []
        kept = None if limit is None else max(limit - 1, 0)
        ids, mask = padded([[*row[:kept], self.ends[0]] for row in rows], self.pad)
        return {"target_ids": ids, "target_mask": mask}

    @abstractmethod
    def read(
        self,
        stock: Any,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_sizes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What the decoder goes on from: tensors [b, ...] that only this family understands.

        Args:
            stock: the unwrapped model.
            pixel_values: [b, 3, s, s]; also [b, f, 3, s, s] where the family reads videos; None
                for `text_prompts`, where the family has them; or as `pixels` gives them.
            input_ids: [b, t] as `prompts` makes them.
            attention_mask: [b, t].
            image_sizes: [b, 2] where the pixels are those of `pixels`.
        """

    def image_tokens(
        self, stock: Any, pixel_values: Tensor, image_sizes: Tensor | None = None
    ) -> Sequence[Tensor]:
        """The tokens [k, d] of each image, as the language model is given them.

        Raises:
            TypeError: this family gives its language model none.
        """
        raise TypeError(f"{type(self.model).__name__} gives its decoder no image tokens")

    @contextmanager
    def each_once(self, images: Sequence[int] | None) -> Iterator[None]:
        """While it lasts, `read` sees an image once that several prompts are about.

        A family whose `read` does not take its tokens from `image_tokens` sees each as often as it
        is asked about, which gives the same.

        Args:
            images: for each prompt, the first that has the same image; None: all differ.
        """
        distinct = list(dict.fromkeys(images or ()))
        if images is None or len(distinct) == len(images):
            yield
            return
        named = self.__dict__.get("image_tokens")
        own, order = self.image_tokens, [distinct.index(i) for i in images]

        def tokens(
            stock: Any, pixel_values: Tensor, image_sizes: Tensor | None = None
        ) -> Sequence[Tensor]:
            sizes = None if image_sizes is None else _chosen(image_sizes, distinct)
            found: Any = own(stock, _chosen(pixel_values, distinct), sizes)
            return [found[i] for i in order] if isinstance(found, list) else _chosen(found, order)

        self.image_tokens = tokens
        try:
            yield
        finally:
            if named is None:
                del self.image_tokens
            else:
                self.image_tokens = named

    @property
    def packs(self) -> int | None:
        """The id of an image's tokens where prompts may be packed, see `packing`; else None."""
        return None

    @property
    def packs_writing(self) -> bool:
        """Whether what packed prompts go on with may be written as `packing.written` does."""
        return False

    @abstractmethod
    def continued(
        self, stock: Any, context: Mapping[str, Tensor], target_ids: Tensor, target_mask: Tensor
    ) -> Tensor:
        """[n, t, v]: the scores from which each target token [n, t] is predicted.

        Args:
            stock: the unwrapped model.
            context: of n prompts, or rows of such a context.
            target_ids: [n, t] as `targets` makes them.
            target_mask: [n, t].
        """

    def everywhere(
        self, stock: Any, context: Mapping[str, Tensor], target_ids: Tensor, target_mask: Tensor
    ) -> Tensor:
        """[n, s, v]: the scores that every token read gives to the next, prompt and image included.

        The last t are those of `continued`. An encoder-decoder scores its decoder's tokens only.

        Raises:
            TypeError: this family computes the scores of targets only.
        """
        raise TypeError(f"{type(self.model).__name__} scores the tokens of its targets only")

    @abstractmethod
    def written(self, stock: Any, context: Mapping[str, Tensor], decoding: Decoding) -> Tensor:
        """[b, m]: ids of new tokens only; what follows an end token is padding."""

    def target_logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """[n, t, v] scores of the target tokens, as one forward pass of the (wrapped) model.

        Args:
            model: possibly wrapped.
            batch: {pixel_values, input_ids, attention_mask} of b prompts (image_sizes too, where
                `pixels` made them), {target_ids, target_mask} of n targets, and owner [n]: the
                prompt that each target follows.
        """
        stock: Any = unwrapped(model)

        def compute(owner: Tensor, target_ids: Tensor, target_mask: Tensor, **read: Any) -> Tensor:
            context = self.read(stock, **read)
            rows = {name: value[owner] for name, value in context.items()}
            return self.continued(stock, rows, target_ids, target_mask)

        names = ("target_ids", "target_mask", "owner")
        given = _read_of(batch) | {name: batch[name] for name in names}
        return forward_through(model, stock, compute, **given)

    def generate(self, model: nn.Module, batch: Mapping[str, Tensor], decoding: Decoding) -> Tensor:
        """[b, m] ids of what is written after the prompts of `batch`; see `written`."""
        stock: Any = unwrapped(model)
        context = self.read(stock, **_read_of(batch))
        return self.written(stock, context, decoding)

    def embed_pairs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> PairEmbeddings:
        raise self._embeds_nothing()

    def encode_image(self, model: nn.Module, pixel_values: Tensor) -> Tensor:
        raise self._embeds_nothing()

    def encode_text(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        raise self._embeds_nothing()

    def _embeds_nothing(self) -> TypeError:
        return TypeError(
            f"{type(self.model).__name__} writes text (answers, captions) and embeds no pairs; "
            f"for retrieval use {self.instead}"
        )


def _chosen(rows: Any, numbers: Sequence[int]) -> Any:
    from mmtune.constants import constant

    return rows[constant(numbers, rows.device)]


def _read_of(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: batch[name] for name in (*READ, *({SIZES} & batch.keys()))}
