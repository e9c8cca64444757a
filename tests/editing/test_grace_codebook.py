"""GRACE's rules by hand-made keys: what a new key does to those there are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editing.methods.grace_codebook import Codebook

ONE, TWO = torch.ones(3), torch.full((3,), 2.0)


def key(x, y=0.0):
    return torch.tensor([x, y])


def book_of(*edits, radius=1.0):
    """A codebook of (x, label), and the entries that they were given."""
    book, entries = Codebook.empty(2, 3), []
    for x, label in edits:
        book, entry = book.placed(key(x), ONE, label, radius)
        entries.append(entry)
    return book, entries


def test_far_keys_are_entries_of_their_own():
    book, entries = book_of((0.0, "a"), (2.5, "b"), (-2.5, "a"))
    assert entries == [0, 1, 2]
    assert book.radii.tolist() == [1.0, 1.0, 1.0]
    assert book.labels == ("a", "b", "a")


def test_the_same_label_nearby_expands():
    book, entries = book_of((0.0, "a"), (1.5, "a"))
    assert entries == [0, 0]
    assert len(book) == 1
    assert book.radii.tolist() == [1.5]
    assert book.nearest(key(1.5)[None]).inside.all()
    assert not book.nearest(key(1.6)[None]).inside.any()
    again, entry = book.placed(key(0.5), TWO, "a", 1.0)  # reached already
    assert entry == 0
    assert again.radii.tolist() == [1.5]
    assert torch.equal(again.values, book.values)
    slack, _ = book.placed(key(2.0), TWO, "a", 1.0, same=0.25)  # 0.25 of |key|
    assert slack.radii.tolist() == [2.5]


def test_another_label_nearby_splits():
    book, entries = book_of((0.0, "a"), (1.5, "b"))
    assert entries == [0, 1]
    assert book.radii.tolist() == [0.75, 0.75]
    near = book.nearest(torch.stack([key(0.7), key(0.8), key(0.7, 0.7)]))
    assert near.index.tolist() == [0, 1, 0]
    assert near.inside.tolist() == [True, True, False]
    # A split takes from radii and never adds to them.
    third, _ = book.placed(key(-1.6), ONE, "c", 1.0)
    assert third.radii.tolist() == pytest.approx([0.75, 0.75, 0.8])


def test_the_latest_edit_of_one_key_counts():
    book, _ = book_of((1.0, "a"), (4.0, "b"))
    new, entry = book.placed(key(1.0), TWO, "c", 1.0)
    assert entry == 0
    assert new.labels == ("c", "b")
    assert new.values.tolist() == [[2.0] * 3, [1.0] * 3]
    assert new.radii.tolist() == [1.0, 1.0]
    assert book.labels == ("a", "b")
    _, rounded = book.placed(key(1.0001), TWO, "c", 1.0, same=1e-3)
    assert rounded == 0


def test_joined_books_keep_both_values():
    first, _ = book_of((0.0, "a"), (5.0, "b"))
    later = Codebook(
        torch.stack([key(0.5), key(5.0), key(1.2)]),
        torch.stack([TWO] * 3),
        torch.ones(3),
        ("a", "c", "d"),
    )
    book = first.joined(later)
    assert book.labels == ("a", "c", "a", "d")
    assert book.values[:, 0].tolist() == [1.0, 2.0, 2.0, 2.0]
    assert book.radii.tolist() == pytest.approx([1.0, 1.0, 0.35, 0.35])
    assert Codebook.empty(2, 3).joined(later).labels == ("a", "c", "d")


EDITS = st.lists(
    st.tuples(st.integers(-40, 40), st.integers(-40, 40), st.sampled_from("abc")),
    min_size=1,
    max_size=25,
)


@settings(deadline=None, max_examples=60)
@given(EDITS, st.sampled_from([0.25, 1.0, 3.0]))
def test_a_new_edit_is_found_and_every_key_says_its_own_label(edits, radius):
    book = Codebook.empty(2, 3)
    for x, y, label in edits:
        query = key(x / 4, y / 4)
        before = book
        book, entry = book.placed(query, ONE, label, radius)
        near = book.nearest(query[None])
        assert bool(near.inside)
        assert book.labels[int(near.index)] == book.labels[entry] == label
        own = book.nearest(book.keys)
        assert own.inside.all()
        assert own.index.tolist() == list(range(len(book)))
        # At most one entry that was there is touched.
        assert int((book.radii[: len(before)] != before.radii).sum()) <= 1
        assert torch.equal(book.keys[: len(before)], before.keys)
    # Two entries of different labels never share their nearest point of conflict: halves.
    assert len(book) <= len(edits)
    assert bool((book.radii > 0).all())
