"""Everything the recipe trains on, as tensors on one device."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.zoo import data_path
from mmtune.zoo.tiny_clip import captions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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


def read_pictures(name: str, split: str, limit: int | None = None, side: int = SIDE) -> Pictures:
    """Decode a split, squashed to `side` pixels; `limit` takes its first rows only."""
    import numpy as np
    import torch
    from PIL import Image

    rows = split_table(name, split).slice(0, limit).to_pylist()
    squares = []
    for row in rows:
        with Image.open(io.BytesIO(row.pop("image")["bytes"])) as opened:
            image = opened.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        squares.append(np.asarray(image))
    pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()
    return Pictures(pixels, rows, captions.text_groups(rows))


def with_icons(pictures: Pictures, folder: Path) -> Pictures:
    """The drawings, then the icons below `folder`, but those named like a held-out drawing."""
    import numpy as np
    import torch
    from PIL import Image

    from mmtune.zoo.tiny_clip.icons import read_icons

    held = set()
    for split in ("val", "test", "test-text"):
        table = split_table("clipart", split)
        held |= set(table["caption"].to_pylist()) | set(table["title"].to_pylist())
    icons = [row for row in read_icons(folder, SIDE) if row["name"] not in held]
    squares = []
    for row in icons:
        with Image.open(io.BytesIO(row["image"])) as opened:
            squares.append(np.asarray(opened.convert("RGB")))
    pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
    plain = {"keywords": [], "description": ""}
    rows = [{"caption": row["name"], "title": row["name"], **plain} for row in icons]
    every = pictures.rows + rows
    return Pictures(torch.cat([pictures.pixels, pixels]), every, captions.text_groups(every))


def training_texts(pictures: Pictures, count: int, seed: int) -> list[list[str]]:
    """`count` texts for each drawing of the split, always the same for one seed."""
    draw = random.Random(seed)
    return [captions.variants(row, count, draw) for row in pictures.rows]


def on_device(
    pictures: Pictures,
    clipart: int,
    texts: list[list[str]],
    words: list[str],
    sentences: Tensor,
    tokenizer_folder: Path,
    context: int,
    device: torch.device,
) -> Material:
    """Tokenize and move everything to `device`.

    Args:
        pictures: n drawings.
        clipart: how many of them are clipart; icons follow.
        texts: n lists of v texts.
        words: w further texts.
        sentences: [n * v + w, 384], embeddings of the texts in order, then of the words.
        tokenizer_folder: holds the trained tokenizer.
        context: tokens a text.
        device: where training runs.
    """
    import torch
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(tokenizer_folder))
    flat = [text for some in texts for text in some]
    ids = tokenizer(
        flat + words,
        return_tensors="pt",
        padding="max_length",
        truncation=True,
        max_length=context,
    ).input_ids.to(device)
    count, variants = len(texts), len(texts[0])
    sentences = sentences.to(device)
    cut = count * variants
    pictures.pixels = pictures.pixels.to(device)
    return Material(
        pictures=pictures,
        mirror=torch.tensor([captions.may_mirror(r) for r in pictures.rows], device=device),
        groups=torch.tensor(pictures.groups, device=device),
        clipart=clipart,
        tokens=ids[:cut].reshape(count, variants, context),
        sentences=sentences[:cut].reshape(count, variants, -1),
        word_tokens=ids[cut:],
        word_sentences=sentences[cut:],
    )
