"""How well a LlavaForConditionalGeneration answers questions about drawings it has not seen."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmtune.zoo.llava import prompt_parts
from mmtune.zoo.tiny_blip.scores import Score, ratio
from mmtune.zoo.tiny_clip.material import squares
from mmtune.zoo.tiny_llava.questions import (
    DRAWING_KINDS,
    SHAPE_KINDS,
    Question,
    ask,
    drawings,
    shapes,
)

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 64
NAMING = "name"  # open-ended; reported, and not part of the mean over kinds
Item = tuple[int, Question]  # the number of its row, and the question


def items(name: str, split: str, limit: int = 0) -> tuple[list[dict[str, Any]], list[Item]]:
    """The held-out questions of a split: one of each kind about each picture, always the same.

    Args:
        name: a data set of `clipart`'s layout, or "easy-vqa".
        split: of it.
        limit: pictures used, the first ones; 0 means all.
    """
    is_shapes = name == "easy-vqa"
    rows = shapes(split) if is_shapes else drawings(name, split)
    others = [] if is_shapes else [row["thing"] for row in drawings("clipart", "train")]
    kinds = SHAPE_KINDS if is_shapes else DRAWING_KINDS
    rows, draw = rows[: limit or None], random.Random(0)
    return rows, [(i, ask(row, kind, draw, others)) for i, row in enumerate(rows) for kind in kinds]


def pixels_of(rows: Sequence[dict[str, Any]], side: int) -> Tensor:
    """[n, 3, side, side] in [-1, 1], as the shipped preprocessing shows pictures."""
    return squares((row["image"]["bytes"] for row in rows), side).float() / 127.5 - 1


def answers_of(
    model: Any, tokenizer: Any, pixels: Tensor, asked: Sequence[tuple[int, str]], **options: Any
) -> list[str]:
    """Greedy answers to questions, each with the number of its picture, by the stock `generate`."""
    import torch

    config, device = model.config, next(model.parameters()).device
    mark = tokenizer.convert_ids_to_tokens(config.image_token_id) * config.image_seq_length
    given: list[str] = []
    for start in range(0, len(asked), BATCH):
        some = asked[start : start + BATCH]
        texts = [mark.join(prompt_parts(question)) for _, question in some]
        read = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt").to(device)
        with torch.no_grad():
            out = model.generate(
                input_ids=read.input_ids,
                attention_mask=read.attention_mask,
                pixel_values=pixels[[row for row, _ in some]].to(device),
                max_new_tokens=8,
                do_sample=False,
                **options,
            )
        new = out[:, read.input_ids.shape[1] :]
        given += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return given


def answer_scores(
    model: Any,
    tokenizer: Any,
    name: str,
    split: str,
    limit: int = 0,
    rephrased: bool = False,
    **options: Any,
) -> dict[str, Score]:
    """Exact answers of each kind of question, in percent.

    Args:
        model: in eval mode.
        tokenizer: of its language model.
        name: see `items`; likewise `split` and `limit`.
        split: of the data set.
        limit: pictures used.
        rephrased: ask in the second wording.
        options: further ones of `generate`.

    Returns:
        {kind: {"value", "low", "high", "n"}}; intervals are bootstraps over questions.
    """
    import numpy as np

    rows, asked = items(name, split, limit)
    texts = [(i, q.rephrased if rephrased else q.text) for i, q in asked]
    pixels = pixels_of(rows, model.config.vision_config.image_size)
    given = answers_of(model, tokenizer, pixels, texts, **options)
    right = np.array([q.answer == a.lower() for (_, q), a in zip(asked, given, strict=True)])
    kinds = np.array([q.kind for _, q in asked])
    return {
        kind: ratio(right[kinds == kind], np.ones((kinds == kind).sum()))
        for kind in dict.fromkeys(kinds.tolist())
    }


def mean_of_kinds(*scores: dict[str, Score]) -> float:
    """Percent right, every kind but open naming weighing the same."""
    values = [s["value"] for found in scores for kind, s in found.items() if kind != NAMING]
    return sum(values) / len(values)
