"""Pools of questions that edits must not touch, and which of them suits a sample best."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_builders.partition import splits_of
from data_builders.samples import Keeper, Sample, seed_of
from mmtune.data.records import ImageProblem
from mmtune.data.texts import normalised

if TYPE_CHECKING:
    from data_builders.pictures import Pictures

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A question of a pool.

    Attributes:
        sample: as the pool has it.
        key: what must not be in two splits: the digest of its picture, or the question.
        order: decides between entries that suit equally.
    """

    sample: Sample
    key: str
    order: int

    @property
    def answer(self) -> str:
        """What is to be kept."""
        return self.sample.target or self.sample.answers[0]

    @property
    def kind(self) -> str:
        """Of the question."""
        return str(self.sample.fields.get("kind", ""))

    def keeper(self) -> Keeper:
        """As a sample holds it."""
        return Keeper(self.sample.question, self.answer, self.sample.image, self.sample.id)


class Digests:
    """Names of pictures by their bytes; each file is read once."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures
        self.known: dict[str, str] = {}

    def of(self, reference: str) -> str:
        """The digest of a picture. Raises ImageProblem where it cannot be read."""
        if reference not in self.known:
            self.known[reference] = self.pictures.digest(reference)
        return self.known[reference]

    def or_none(self, reference: str) -> str:
        """The digest; empty, with a warning, for a picture that cannot be read."""
        try:
            return self.of(reference) if reference else ""
        except ImageProblem as error:
            log.warning("a question of the image pool is left out: %s", error)
            return ""


class Pool:
    """The questions of one split, which are used equally often.

    Args:
        entries: the questions.
        reuse: whether one may be taken again.
    """

    def __init__(self, entries: Sequence[Entry], reuse: bool) -> None:
        self.reuse = reuse
        # Concept and kind of the question -> [(how often it was used, order, entry)] as a heap.
        self.heaps: dict[tuple[str, str], list[tuple[int, int, Entry]]] = {}
        for entry in sorted(entries, key=lambda e: e.order):
            heap = self.heaps.setdefault((entry.sample.concept, entry.kind), [])
            heap.append((0, entry.order, entry))

    def best(self, sample: Sample) -> Entry | None:
        """What suits a sample best, or None.

        An answer that is the sample's target never does. Another concept comes before the same
        one, unused before used, the same kind of question before another.
        """
        kind, target = str(sample.fields.get("kind", "")), normalised(sample.target)
        found = None
        for (concept, own), heap in self.heaps.items():
            same = bool(concept) and concept == sample.concept
            if found and (same, heap[0][0], own != kind, heap[0][1]) > found[0]:
                continue  # its best is not good enough, whether the answer is the target or not
            item = _first(heap, target)
            if item and (self.reuse or not item[0]):
                rank = (same, item[0], own != kind, item[1])
                found = (rank, item[2]) if found is None or rank < found[0] else found
        return found[1] if found else None

    def use(self, entry: Entry) -> None:
        """Note that a question was taken."""
        heap = self.heaps[entry.sample.concept, entry.kind]
        at = next(i for i, item in enumerate(heap) if item[2] is entry)
        used = (heap[at][0] + 1, entry.order, entry)
        if at == 0:
            heapq.heapreplace(heap, used)
        else:
            heap[at] = used
            heapq.heapify(heap)


def entries_of(
    pool: Sequence[Sample], key: Callable[[Sample], str], name: str, seed: int
) -> list[Entry]:
    """The questions of a pool, each once; those without a key are left out.

    Args:
        pool: in any order.
        key: see `Entry`.
        name: of the pool.
        seed: of the order.
    """
    found: dict[tuple[str, str], Sample] = {}
    for sample in sorted(pool, key=lambda s: (s.id, s.question, s.image, s.target)):
        own = key(sample)
        if own:
            found.setdefault((own, normalised(sample.question)), sample)
    drawn = {pair: seed_of(seed, "locality", name, sample.id) for pair, sample in found.items()}
    ordered = sorted(found, key=lambda pair: (drawn[pair], pair))
    return [Entry(found[pair], pair[0], order) for order, pair in enumerate(ordered)]


def dealt(
    entries: Sequence[Entry], need: Mapping[str, int], seed: int, reuse: bool
) -> dict[str, Pool]:
    """Split -> its part of a pool, as large as it has samples; a key is in one part only."""
    parts: dict[str, list[Entry]] = {split: [] for split in need}
    if entries and need:
        keys = {number: [entry.key] for number, entry in enumerate(entries)}
        for number, split in splits_of(keys, seed, need).items():
            parts[split].append(entries[number])
    return {split: Pool(own, reuse) for split, own in parts.items()}


def _first(heap: list[tuple[int, int, Entry]], target: str) -> tuple[int, int, Entry] | None:
    """The least used entry whose answer is not the target; the heap stays as it is."""
    passed = []
    found = None
    while heap and found is None:
        item = heapq.heappop(heap)
        passed.append(item)
        found = None if normalised(item[2].answer) == target else item
    for item in passed:
        heapq.heappush(heap, item)
    return found
