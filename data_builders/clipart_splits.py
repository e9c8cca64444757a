"""Splits of the clipart records that let no text and no near-duplicate picture cross."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_builders.near_duplicates import components, near_pairs
from data_builders.sources.openclipart import normalise

if TYPE_CHECKING:
    from data_builders.clipart import Record

HELD_OUT = ("animals", "food")
BY_TEXT_ALONE = "clipart-test-text"
NEAR_BITS = 6
_ANIMAL_WORDS = frozenset(
    "animal animals mammal bird birds insect fish dinosaur reptile amphibian dog cat horse".split()
)
# Groups above these sizes go to training: such drawings are series, and a test takes one a text.
_LARGE = 12
_LARGE_PRETRAINING = 5


@dataclass(frozen=True)
class SplitSizes:
    """How many pairs the pre-training tests hold, and how held-out categories are shared out.

    Attributes:
        test: pairs of `clipart-test` and of `clipart-test-text`, before the last check, which
            leaves out a few whose compressed pictures are near duplicates of other splits'.
        val: pairs of `clipart-val`, likewise.
        held_out_test: share of a held-out category's records that its test takes.
        held_out_val: share that its val takes.
        seed: of the shuffles.
    """

    test: int = 500
    val: int = 150
    held_out_test: float = 0.45
    held_out_val: float = 0.08
    seed: int = 0


def text_keys(record: Record) -> tuple[str, str]:
    """The normalised title and caption: records that share either have the same text."""
    return "title:" + normalise(record.text.title), "caption:" + normalise(record.text.caption)


def held_out_category(record: Record) -> str | None:
    """The fine-tuning target that a record belongs to, or None for pre-training."""
    if record.category in HELD_OUT:
        return record.category
    words = {word for keyword in record.text.keywords for word in keyword.split()}
    if words & _ANIMAL_WORDS and record.category != "computer":
        return "animals"
    return None


def split_records(
    records: Sequence[Record], sizes: SplitSizes
) -> tuple[dict[str, list[int]], Counter[str]]:
    """Share records out.

    A component (records tied by text or by near-duplicate pictures) goes whole to one split of one
    data set. `clipart-test-text` is the exception that its name says: its texts are unseen, but
    near-duplicates of its pictures may be in training.

    Args:
        records: n records.
        sizes: see there.

    Returns:
        {"<name>-<split>": sorted record indices}, and how many records were left out, by reason.
    """
    import numpy as np

    dropped: Counter[str] = Counter()
    keys = [text_keys(record) for record in records]
    bits = np.stack([record.bits for record in records])
    component = components(keys, near_pairs(bits, NEAR_BITS))
    targets = _targets(records, component, dropped)
    splits: dict[str, list[int]] = {}
    for category in HELD_OUT:
        members = [i for i, target in enumerate(targets) if target == category]
        splits |= _split_held_out(f"clipart-{category}", members, component, sizes)
    members = [i for i, target in enumerate(targets) if target == ""]
    splits |= _split_pretraining(members, component, keys, sizes, dropped)
    splits = _without_crossing(records, splits, dropped)
    return {name: sorted(chosen) for name, chosen in splits.items()}, dropped


def _targets(
    records: Sequence[Record], component: Sequence[int], dropped: Counter[str]
) -> list[str | None]:
    """Per record: a held-out category, "" for pre-training, None where its component is not its."""
    own = [held_out_category(record) or "" for record in records]
    votes: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for target, number in zip(own, component, strict=True):
        votes[number][target] += 1
    winner = {number: max(sorted(c), key=lambda t: c[t]) for number, c in votes.items()}
    targets: list[str | None] = []
    for target, number in zip(own, component, strict=True):
        kept = target == winner[number]
        targets.append(target if kept else None)
        if not kept:
            dropped["tied by text or picture to another data set"] += 1
    return targets


def _grouped(members: Sequence[int], group: Sequence[int]) -> list[list[int]]:
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for index in members:
        groups[group[index]].append(index)
    return [groups[number] for number in sorted(groups)]


def _split_held_out(
    name: str,
    members: Sequence[int],
    component: Sequence[int],
    sizes: SplitSizes,
) -> dict[str, list[int]]:
    groups = _grouped(members, component)
    random.Random(f"{sizes.seed}:{name}").shuffle(groups)
    wanted = {
        "test": round(sizes.held_out_test * len(members)),
        "val": round(sizes.held_out_val * len(members)),
    }
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for group in groups:
        part = next(
            (
                p
                for p, number in wanted.items()
                if len(group) <= _LARGE and len(parts[p]) + len(group) <= number
            ),
            "train",
        )
        parts[part] += group
    return {f"{name}-{part}": chosen for part, chosen in parts.items()}


def _split_pretraining(
    members: Sequence[int],
    component: Sequence[int],
    keys: Sequence[tuple[str, str]],
    sizes: SplitSizes,
    dropped: Counter[str],
) -> dict[str, list[int]]:
    by_text = components(keys)
    draw = random.Random(f"{sizes.seed}:clipart")
    groups = _grouped(members, component)
    draw.shuffle(groups)
    parts: dict[str, list[int]] = {"test": [], "val": []}
    remaining: list[int] = []
    for group in groups:
        one_each = _one_per_text(group, by_text)
        part = next(
            (
                p
                for p, number in (("test", sizes.test), ("val", sizes.val))
                if len(group) <= _LARGE_PRETRAINING and len(parts[p]) + len(one_each) <= number
            ),
            None,
        )
        if part is None:
            remaining += group
            continue
        parts[part] += one_each
        dropped["same text as a held-out pair"] += len(group) - len(one_each)
    text_groups = _grouped(remaining, by_text)
    draw.shuffle(text_groups)
    small = [g for g in text_groups if len(g) <= _LARGE_PRETRAINING]
    chosen = small[: sizes.test]
    parts["test-text"] = [group[0] for group in chosen]
    dropped["same text as a held-out pair"] += sum(len(group) - 1 for group in chosen)
    taken = {index for group in chosen for index in group}
    parts["train"] = [index for index in remaining if index not in taken]
    return {f"clipart-{part}": found for part, found in parts.items()}


def _without_crossing(
    records: Sequence[Record], splits: dict[str, list[int]], dropped: Counter[str]
) -> dict[str, list[int]]:
    """Leave out of tests what only compression made a near duplicate of another split's picture.

    Training splits stay as they are; of two others, the record of the later path goes.
    """
    import numpy as np

    strict = {i: name for name, some in splits.items() if name != BY_TEXT_ALONE for i in some}
    order = sorted(strict)
    hashes = np.stack([records[i].shipped_bits for i in order])
    gone: set[int] = set()
    for first, second in near_pairs(hashes, NEAR_BITS):
        pair = order[first], order[second]
        if strict[pair[0]] == strict[pair[1]] or gone & set(pair):
            continue
        gone.add(max(pair, key=lambda i: (not strict[i].endswith("-train"), i)))
    if gone:
        dropped["near duplicate of another split once compressed"] = len(gone)
    return {name: [i for i in some if i not in gone] for name, some in splits.items()}


def _one_per_text(group: Sequence[int], by_text: Sequence[int]) -> list[int]:
    return list({by_text[index]: index for index in reversed(group)}.values())
