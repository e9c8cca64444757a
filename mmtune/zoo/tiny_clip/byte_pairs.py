"""Byte-pair merges that are the same on every run.

The learner of the `tokenizers` package numbers the pieces at a word's end in hash order, so that
ties fall differently from run to run; this one settles ties by the text of the pair.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import pairwise

Pair = tuple[str, str]


def learn_merges(words: Mapping[str, int], count: int, end: str = "</w>") -> list[Pair]:
    """Merge the most frequent neighbouring pieces, again and again.

    Args:
        words: how often each word occurs; words are strings of single-letter pieces.
        count: merges wanted; fewer come back where no pair is left.
        end: what marks the last piece of a word.

    Returns:
        Pairs in the order of merging.
    """
    pieces = [[*word[:-1], word[-1] + end] for word in sorted(words) if word]
    weights = [words[word] for word in sorted(words) if word]
    totals: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for index, parts in enumerate(pieces):
        for pair in pairwise(parts):
            totals[pair] += weights[index]
            places[pair].add(index)
    heap = [(-total, pair) for pair, total in totals.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and len(merges) < count:
        negative, best = heapq.heappop(heap)
        if totals[best] != -negative or negative == 0:
            continue  # an entry from before its total changed
        merges.append(best)
        changed: set[Pair] = set()
        for index in places.pop(best):
            old = pieces[index]
            new = _merged(old, best)
            for parts, sign in ((old, -1), (new, 1)):
                for pair in pairwise(parts):
                    totals[pair] += sign * weights[index]
                    changed.add(pair)
                    if sign > 0:
                        places[pair].add(index)
            pieces[index] = new
        for pair in changed:
            if totals[pair] > 0:
                heapq.heappush(heap, (-totals[pair], pair))
    return merges


def _merged(parts: list[str], pair: Pair) -> list[str]:
    result: list[str] = []
    position = 0
    while position < len(parts):
        if tuple(parts[position : position + 2]) == pair:
            result.append(parts[position] + parts[position + 1])
            position += 2
        else:
            result.append(parts[position])
            position += 1
    return result
