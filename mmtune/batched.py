"""Items a few at a time, read as they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items in order; the last one may be shorter.

    As `itertools.batched`, which Python has from 3.12 on.

    Raises:
        ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"size must be 1 or more, got {size}")
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some
