"""Everything the recipe trains on, as tensors on one device."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.zoo import data_path
from mmtune.zoo.tiny_clip import captions
from mmtune.zoo.tiny_clip.teachers import sentence_embeddings, word_list

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mmtune.zoo.tiny_clip.recipe import Recipe

SIDE = 128  # pixels; pictures are squashed to squares, as the shipped preprocessing does


@dataclass
class Pictures:
    """One split.

    Attributes:
        pixels: uint8 [n, 3, side, side].
        rows: the split's rows without the picture.
        groups: n numbers; equal for equal captions.
    """

    pixels: Tensor
    rows: list[dict[str, Any]]
    groups: list[int]


@dataclass
class Gathered:
    """Pictures and texts before they are tokenized.

    Attributes:
        pictures: n drawings.
        clipart: how many of them are clipart; icons follow.
        texts: n lists of v texts.
        words: w further texts.
        sentences: [n * v + w, 384], embeddings of the texts in order, then of the words.
    """

    pictures: Pictures
    clipart: int
    texts: list[list[str]]
    words: list[str]
    sentences: Tensor

    @property
    def flat(self) -> list[str]:
        """The n * v texts in order."""
        return [text for some in self.texts for text in some]


@dataclass
class Material:
    """The training split with its texts, and the extra texts.

    Attributes:
        pictures: the split.
        mirror: bool [n], whether a mirrored drawing keeps its meaning.
        groups: int64 [n].
        clipart: how many of the n are clipart; icons follow.
        tokens: int64 [n, v, t], v texts a drawing; the caption is the first.
        sentences: [n, v, 384], the teacher's embeddings of the same texts.
        word_tokens: int64 [w, t].
        word_sentences: [w, 384].
    """

    pictures: Pictures
    mirror: Tensor
    groups: Tensor
    clipart: int
    tokens: Tensor
    sentences: Tensor
    word_tokens: Tensor
    word_sentences: Tensor


def split_table(name: str, split: str) -> Any:
    """A split as a pyarrow table."""
    import pyarrow.parquet as pq

    return pq.read_table(data_path(name, split))


def squares(images: Iterable[bytes], side: int) -> Tensor:
    """Decode pictures and squash them, as the shipped preprocessing does: [n, 3, side, side]."""
    import numpy as np
    import torch
    from PIL import Image

    found = []
    for image in images:
        with Image.open(io.BytesIO(image)) as opened:
            square = opened.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        found.append(np.asarray(square))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


def read_pictures(name: str, split: str, limit: int | None = None, side: int = SIDE) -> Pictures:
    """Decode a split, squashed to `side` pixels; `limit` takes its first rows only."""
    rows = split_table(name, split).slice(0, limit).to_pylist()
    pixels = squares((row.pop("image")["bytes"] for row in rows), side)
    return Pictures(pixels, rows, captions.text_groups(rows))


def held_out_names() -> set[str]:
    """Captions and titles of `clipart`'s val and tests."""
    held: set[str] = set()
    for split in ("val", "test", "test-text"):
        table = split_table("clipart", split)
        held |= set(table["caption"].to_pylist()) | set(table["title"].to_pylist())
    return held


def with_icons(pictures: Pictures, folder: Path) -> Pictures:
    """The drawings, then the icons below `folder`, but those named like a held-out drawing."""
    import torch

    from mmtune.zoo.tiny_clip.icons import read_icons

    held = held_out_names()
    icons = [row for row in read_icons(folder, SIDE) if row["name"] not in held]
    pixels = squares((row["image"] for row in icons), SIDE)
    plain = {"keywords": [], "description": ""}
    rows = [{"caption": row["name"], "title": row["name"], **plain} for row in icons]
    every = pictures.rows + rows
    return Pictures(torch.cat([pictures.pixels, pixels]), every, captions.text_groups(every))


def training_texts(pictures: Pictures, count: int, seed: int) -> list[list[str]]:
    """`count` texts for each drawing of the split, always the same for one seed."""
    draw = random.Random(seed)
    return [captions.variants(row, count, draw) for row in pictures.rows]


def gather(recipe: Recipe, teachers: Path, icons: Path | None, device: torch.device) -> Gathered:
    """Training pictures, their texts, further words, and the embeddings of both.

    Args:
        recipe: the numbers.
        teachers: folder below which the two teacher packages are unpacked (or their cache).
        icons: folder with the icon packages; None means clipart alone.
        device: where embeddings are computed if no cache has them.
    """
    pictures = read_pictures("clipart", "train", recipe.limit or None)
    clipart = len(pictures.rows)
    if icons is not None:
        pictures = with_icons(pictures, icons)
    texts = training_texts(pictures, recipe.variants, recipe.seed)
    words = word_list(teachers)[: recipe.words or None]
    every = [text for some in texts for text in some] + words
    unique = list(dict.fromkeys(every))
    row = {text: i for i, text in enumerate(unique)}
    sentences = sentence_embeddings(teachers, unique, device)[[row[text] for text in every]]
    return Gathered(pictures, clipart, texts, words, sentences)


def on_device(gathered: Gathered, tokenizer: Any, context: int, device: torch.device) -> Material:
    """Tokenize and move everything to `device`.

    Args:
        gathered: drawings with their texts, and further words.
        tokenizer: of the model.
        context: tokens a text.
        device: where training runs.
    """
    import torch

    pictures = gathered.pictures
    count, variants = len(gathered.texts), len(gathered.texts[0])
    cut = count * variants
    ids = tokenizer(
        gathered.flat + gathered.words,
        return_tensors="pt",
        padding="max_length",
        truncation=True,
        max_length=context,
    ).input_ids.to(device)
    sentences = gathered.sentences.to(device)
    pictures.pixels = pictures.pixels.to(device)
    return Material(
        pictures=pictures,
        mirror=torch.tensor([captions.may_mirror(r) for r in pictures.rows], device=device),
        groups=torch.tensor(pictures.groups, device=device),
        clipart=gathered.clipart,
        tokens=ids[:cut].reshape(count, variants, -1),
        sentences=sentences[:cut].reshape(count, variants, -1),
        word_tokens=ids[cut:],
        word_sentences=sentences[cut:],
    )
