"""Everything the recipe trains on, as tensors on one device."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.zoo.llava import prompt_parts
from mmtune.zoo.tiny_clip.captions import may_mirror
from mmtune.zoo.tiny_clip.material import SIDE, held_out_names, squares
from mmtune.zoo.tiny_llava.questions import (
    DRAWING_KINDS,
    SHAPE_KINDS,
    Question,
    ask,
    drawings,
    shapes,
)
from mmtune.zoo.tiny_llava.things import thing_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mmtune.zoo.tiny_llava.recipe import LlavaRecipe

TRAINED = ("clipart", "clipart-animals", "clipart-food")


@dataclass
class Asked:
    """n pictures with q questions each: drawings, then icons, then shapes.

    Attributes:
        pixels: uint8 [n, 3, s, s].
        mirror: bool [n], whether a mirrored picture has the same answers.
        parts: how many drawings, icons and shapes there are.
        ids: int64 [n, q, t], what follows the image: the question's tokens, then the answer's.
        begin: int64 [n, q], where the answer begins.
        end: int64 [n, q], behind its end token.
        opening: int64 [p], what stands before the image.
        kept: int64 [k], ids that answers are told from.
    """

    pixels: Tensor
    mirror: Tensor
    parts: tuple[int, int, int]
    ids: Tensor
    begin: Tensor
    end: Tensor
    opening: Tensor
    kept: Tensor


def icon_rows(folder: Path) -> list[dict[str, Any]]:
    """Icons whose thing is known, but those named like a held-out drawing."""
    from mmtune.zoo.tiny_clip.icons import read_icons

    held, rows = held_out_names(), []
    for icon in read_icons(folder, SIDE):
        row = {"title": icon["name"], "keywords": [], "caption": icon["name"], "image": icon}
        thing = thing_of(row)
        if thing is not None and icon["name"] not in held:
            image = {"bytes": icon["image"]}
            rows.append(row | {"id": icon["name"], "thing": thing, "image": image})
    return rows


def gather(recipe: LlavaRecipe, icons: Path | None, tokenizer: Any, device: torch.device) -> Asked:
    """Pictures and questions of the training splits.

    Args:
        recipe: the numbers.
        icons: folder with the icon packages; None trains without.
        tokenizer: of the language model.
        device: where training runs.
    """
    import torch

    limit = recipe.limit or None
    drawn = [row for name in TRAINED for row in drawings(name, "train")[:limit]]
    more = icon_rows(icons)[:limit] if icons else []
    shown = shapes("train", recipe.limit)
    draw = random.Random(recipe.seed)
    things = [row["thing"] for row in drawn + more]
    weights = [getattr(recipe, f"{kind}_share") for kind in DRAWING_KINDS]
    asked: list[Question] = []
    for row in drawn + more:
        kinds = draw.choices(DRAWING_KINDS, weights, k=recipe.asked)
        asked += [ask(row, kind, draw, things) for kind in kinds]
    for row in shown:
        kinds = draw.choices(SHAPE_KINDS, k=recipe.asked)
        asked += [ask(row, kind, draw, ()) for kind in kinds]
    rows = drawn + more + shown
    opening, ids, begin, end = _tokens(asked, tokenizer)
    seen = torch.zeros(len(tokenizer), dtype=torch.bool)
    seen[: recipe.kept] = True
    seen[ids.flatten()] = True
    mirror = [may_mirror(row) for row in drawn + more] + [True] * len(shown)
    shape = (len(rows), recipe.asked)
    return Asked(
        pixels=squares((row["image"]["bytes"] for row in rows), SIDE).to(device),
        mirror=torch.tensor(mirror, device=device),
        parts=(len(drawn), len(more), len(shown)),
        ids=ids.reshape(*shape, -1).to(device),
        begin=begin.reshape(shape).to(device),
        end=end.reshape(shape).to(device),
        opening=opening.to(device),
        kept=seen.nonzero()[:, 0].to(device),
    )


def _tokens(asked: Sequence[Question], tokenizer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Opening [p]; ids [n, t] of questions and answers; where answers begin and end, [n] each."""
    import torch

    before, _ = prompt_parts("")
    behind = tokenizer([prompt_parts(item.text)[1] for item in asked]).input_ids
    told = tokenizer([item.answer for item in asked]).input_ids
    stop = tokenizer.eos_token_id
    rows = [[*text, *answer, stop] for text, answer in zip(behind, told, strict=True)]
    ids = torch.full((len(rows), max(map(len, rows))), stop)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    opening = torch.tensor(tokenizer(before).input_ids)
    return opening, ids, torch.tensor([*map(len, behind)]), torch.tensor([*map(len, rows)])


def draw_batch(
    data: Asked, recipe: LlavaRecipe, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Numbers of random pictures and of one question about each, int64 [b] twice.

    Pictures come in the order of `Asked.parts`, in the recipe's shares.
    """
    import torch

    drawn, icons, shown = data.parts
    shape = round(recipe.batch * recipe.shape_share) if shown else 0
    icon = round(recipe.batch * recipe.icon_share) if icons else 0
    parts, start = [], 0
    for have, want in ((drawn, recipe.batch - shape - icon), (icons, icon), (shown, shape)):
        if want:
            parts.append(
                start + torch.randint(have, (want,), generator=generator, device=data.pixels.device)
            )
        start += have
    index = torch.cat(parts)
    question = torch.randint(
        data.ids.shape[1], (len(index),), generator=generator, device=index.device
    )
    return index, question
