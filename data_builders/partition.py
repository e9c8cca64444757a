"""Who goes into which split: what shares an image stays together, and shares come out even."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from data_builders.samples import seed_of

K = TypeVar("K", bound=Hashable)


def splits_of(
    keys: Mapping[K, Sequence[str]],
    seed: int,
    shares: Mapping[str, float],
    fixed: Mapping[K, str] | None = None,
) -> dict[K, str]:
    """Item -> its split; items that have a key in common, or each with a third, share it.

    Groups are dealt out from the largest to the smallest, equal ones in random order, each to the
    split that lacks most; a split without any comes first while there are just enough groups for
    those. The order of the items does not matter.

    Args:
        keys: item -> what it is made of, such as digests of its images; at least one.
        seed: of the order.
        shares: split -> its part, in any unit.
        fixed: item -> the split that it is to have, which its whole group then has; of several that
            of most.
    """
    groups = sorted(
        _groups(keys).items(), key=lambda pair: (-len(pair[1]), seed_of(seed, "split", pair[0]))
    )
    whole = sum(shares.values())
    lacking = {split: len(keys) * share / whole for split, share in shares.items()}
    empty = {split for split, share in shares.items() if share}
    found: dict[K, str] = {}
    for number, (_, items) in enumerate(groups):
        wanted = Counter(fixed[item] for item in items if item in fixed) if fixed else Counter()
        if wanted:
            split = min(wanted, key=lambda name: (-wanted[name], name))
        else:
            must = len(groups) - number <= len(empty)
            split = max(empty if must else lacking, key=lambda name: (lacking.get(name, 0), name))
        empty.discard(split)
        lacking[split] = lacking.get(split, 0.0) - len(items)
        found |= dict.fromkeys(items, split)
    return found


def _groups(keys: Mapping[K, Sequence[str]]) -> dict[str, list[K]]:
    """The least key of a group -> its items."""
    above: dict[str, str] = {}

    def top(key: str) -> str:
        while above.setdefault(key, key) != key:
            above[key] = key = above[above[key]]
        return key

    for own in keys.values():
        for key in own[1:]:
            one, two = sorted((top(own[0]), top(key)))
            above[two] = one
    groups: dict[str, list[K]] = {}
    for item, own in keys.items():
        groups.setdefault(top(own[0]), []).append(item)
    return groups
