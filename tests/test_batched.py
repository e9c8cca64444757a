"""Items in lists of a size, read no sooner than they are needed."""

from __future__ import annotations

from itertools import chain, count, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtune.batched import batched


@given(st.lists(st.integers()), st.integers(1, 7))
def test_every_item_comes_once_in_order_and_only_the_last_list_is_short(items, size):
    found = list(batched(iter(items), size))
    assert list(chain.from_iterable(found)) == items
    assert all(len(some) == size for some in found[:-1])
    assert all(0 < len(some) <= size for some in found)


def test_no_more_is_read_than_was_asked_for():
    numbers = count()
    assert list(islice(batched(numbers, 3), 2)) == [[0, 1, 2], [3, 4, 5]]
    assert next(numbers) == 6


def test_a_size_that_would_lose_every_item_is_refused():
    with pytest.raises(ValueError, match="size must be 1 or more, got 0"):
        list(batched([1], 0))
