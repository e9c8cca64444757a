"""Which queries changed, as pictures for the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmtune.data.records import VideoFile
from mmtune.data.video import picture
from mmtune.tasks.base import GalleryItem, Shown, places_for_gains

if TYPE_CHECKING:
    from mmtune.metrics.recall import QueryRanks, RetrievalRanks
    from mmtune.tasks.pairs import Gallery

SHOWN = 3  # answers per query


@dataclass(frozen=True)
class _Change:
    """A query of one direction, and how far its rank moved: above 0 is better."""

    direction: str
    query: int
    moved: float
    crossed: bool


def changed_queries(
    split: Gallery, before: RetrievalRanks, after: RetrievalRanks, limit: int
) -> list[GalleryItem]:
    """Queries whose rank changed together with their first three answers.

    Gains come first, then losses. Each takes half of the places, and more where the other has too
    few; a third of each are image queries where there are any. Within a kind, queries whose right
    answer moved into or out of the first three come before others, then the larger ratio of ranks.

    Args:
        split: images and captions that both evaluations ranked.
        before: ranks before.
        after: ranks after.
        limit: how many queries at most.
    """
    changes = _one_a_text(split, _changes("txt2img", before.txt2img, after.txt2img))
    changes += _changes("img2txt", before.img2txt, after.img2txt)
    gains = [c for c in changes if c.moved > 0]
    losses = [c for c in changes if c.moved < 0]
    gains = _mixed(gains, places_for_gains(limit, len(losses)))
    losses = _mixed(losses, limit - len(gains))
    return [_item(c, split, before, after) for c in gains + losses]


def _changes(direction: str, before: QueryRanks, after: QueryRanks) -> list[_Change]:
    old, new = before.ranks(), after.ranks()
    moved = np.log(old) - np.log(new)
    n = min(SHOWN, before.top.shape[1])
    other = (before.top[:, :n] != after.top[:, :n]).any(1)
    crossed = (before.hits(SHOWN) > 0.5) != (after.hits(SHOWN) > 0.5)
    return [
        _Change(direction, int(q), float(moved[q]), bool(crossed[q]))
        for q in np.flatnonzero(other & (moved != 0))
    ]


def _one_a_text(split: Gallery, changes: list[_Change]) -> list[_Change]:
    """Equal captions have equal results: the first of them stands for all."""
    return list({split.captions[c.query]: c for c in reversed(changes)}.values())[::-1]


def _mixed(changes: list[_Change], places: int) -> list[_Change]:
    """The most changed ones, about a third of them image queries."""
    changes = sorted(changes, key=lambda c: (c.crossed, abs(c.moved)), reverse=True)
    texts = [c for c in changes if c.direction == "txt2img"]
    images = [c for c in changes if c.direction == "img2txt"]
    for_images = min(len(images), max(places // 3, places - len(texts)))
    return texts[: places - for_images] + images[:for_images]


def _item(
    change: _Change, split: Gallery, before: RetrievalRanks, after: RetrievalRanks
) -> GalleryItem:
    old: QueryRanks = getattr(before, change.direction)
    new: QueryRanks = getattr(after, change.direction)
    q = change.query
    media = "video" if isinstance(split.records[0].image, VideoFile) else "image"
    what = f"text to {media}" if change.direction == "txt2img" else f"{media} to text"
    title = f"{what}: rank {old.ranks()[q]:g} → {new.ranks()[q]:g}"
    if change.direction == "txt2img":
        query = Shown(text=split.captions[q])
        cells = [_images(split, ranks.top[q][:SHOWN], split.images_of[q]) for ranks in (old, new)]
    else:
        query = Shown(image=picture(split.records[q].image), text=split.records[q].captions[0])
        cells = [_texts(split, ranks.top[q][:SHOWN], split.captions_of[q]) for ranks in (old, new)]
    return GalleryItem(title, query, *cells)


def _images(split: Gallery, answers: np.ndarray, right: list[int]) -> list[Shown]:
    return [
        Shown(picture(split.records[a].image), split.records[a].captions[0], a in right)
        for a in map(int, answers)
    ]


def _texts(split: Gallery, answers: np.ndarray, right: list[int]) -> list[Shown]:
    return [Shown(text=split.captions[int(a)], correct=int(a) in right) for a in answers]
