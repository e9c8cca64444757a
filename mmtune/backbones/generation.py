"""Token layouts of models that write text, and how their output becomes numbers and words.

Rows of prompts end together (padding on the left) wherever text goes on from them, so that the
first token of every target stands in the same column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Decoding:
    """How text is written; greedily with one beam.

    Attributes:
        beams: of beam search.
        min_tokens: new tokens before the text may end.
        max_tokens: new tokens at most, the end token included.
        length_penalty: a beam's score is its log-probability / length ** length_penalty.
        cache: keep keys and values of earlier tokens; off, the same words take longer.
    """

    beams: int = 1
    min_tokens: int = 0
    max_tokens: int = 20
    length_penalty: float = 1.0
    cache: bool = True

    def within(self, room: int | None) -> Decoding:
        """The same with at most `room` new tokens, but at least one; None is no limit."""
        if room is None or self.max_tokens <= room:
            return self
        most = max(room, 1)
        return replace(self, max_tokens=most, min_tokens=min(self.min_tokens, most))

    def arguments(self, ends: Sequence[int], pad: int) -> dict[str, Any]:
        """The same in the words of transformers' `generate`."""
        return {
            "num_beams": self.beams,
            "min_new_tokens": self.min_tokens,
            "max_new_tokens": self.max_tokens,
            "length_penalty": self.length_penalty,
            "use_cache": self.cache,
            "do_sample": False,
            "eos_token_id": list(ends),
            "pad_token_id": pad,
        }


def padded(rows: Sequence[Sequence[int]], pad: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of token ids as int64 ids [n, t] and mask [n, t] (1 for tokens, 0 for padding)."""
    import torch

    width = max(map(len, rows), default=0)
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(len(row))
        ids[i, at] = torch.tensor(row, dtype=torch.int64)
        mask[i, at] = 1
    return ids, mask


def positions(mask: Tensor) -> Tensor:
    """[n, t] position of each token among the tokens of its row; that of padding does not count."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def joined(
    context: Mapping[str, Tensor],
    embed: Callable[[Tensor], Tensor],
    target_ids: Tensor,
    target_mask: Tensor,
) -> dict[str, Tensor]:
    """The input of a decoder-only model that reads a prompt and, but for its last token, a target.

    The scores of the last t positions are those of the t target tokens.

    Args:
        context: {embeds [n, p, d], mask [n, p]} of the prompts.
        embed: the word embedding.
        target_ids: [n, t].
        target_mask: [n, t].
    """
    import torch

    words = embed(target_ids[:, :-1]).to(context["embeds"])
    mask = torch.cat([context["mask"], target_mask[:, :-1]], dim=1)
    return {
        "inputs_embeds": torch.cat([context["embeds"], words], dim=1),
        "attention_mask": mask,
        "position_ids": positions(mask),
    }


def log_probabilities(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """[n, t] log p of each target token, in float32 at least; 0 at padding.

    Args:
        logits: [n, t, v], those of the target tokens.
        ids: [n, t].
        mask: [n, t].
    """
    import torch

    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return logs.gather(-1, ids[..., None])[..., 0].masked_fill(mask == 0, 0.0)


def texts_of(tokenizer: Any, ids: Tensor, ends: Sequence[int]) -> list[str]:
    """The words of each row of written ids [n, t], up to the first end token, stripped."""
    found = []
    for row in ids.tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        found.append(tokenizer.decode(row[:end], skip_special_tokens=True).strip())
    return found


def after_prompt(tokenizer: Any, prompt: str, text: str) -> str:
    """`text` as it is to be tokenized by itself where it goes on from a prompt.

    Byte-level tokenizers tell a word at the start of a text from one behind a space; tokenizers
    that mark the beginning of words by themselves must not be given the space.
    """
    if not text or not prompt or prompt[-1].isspace():
        return text
    first = tokenizer(text, add_special_tokens=False)["input_ids"][:1]
    marked = bool(first) and str(tokenizer.convert_ids_to_tokens(first)[0]).startswith("▁")
    return text if marked else f" {text}"
