"""Splits: what shares a key stays together, and shares come out even."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_builders.partition import splits_of

KEYS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=3)
ITEMS = st.dictionaries(st.text(max_size=4), KEYS, max_size=12)
SHARES = {"train": 0.8, "eval": 0.2}


def apart(keys, found):
    """Whether no key is in two splits."""
    homes = {}
    for item, own in keys.items():
        for key in own:
            homes.setdefault(key, set()).add(found[item])
    return all(len(splits) == 1 for splits in homes.values())


@given(ITEMS, st.integers(0, 3), st.randoms(use_true_random=False))
def test_no_key_is_in_two_splits_whatever_the_order(keys, seed, draw):
    found = splits_of(keys, seed, SHARES)
    assert set(found) == set(keys)
    assert apart(keys, found)
    order = list(keys)
    draw.shuffle(order)
    turned = {item: keys[item][::-1] for item in order}
    assert splits_of(turned, seed, SHARES) == found


@given(st.integers(0, 60), st.integers(0, 5))
def test_single_items_are_dealt_out_by_shares(count, seed):
    found = Counter(splits_of({i: [str(i)] for i in range(count)}, seed, SHARES).values())
    assert abs(found["eval"] - 0.2 * count) < 1 or count < 5
    assert found.total() == count
    if count >= 2:
        assert min(found["eval"], found["train"]) >= 1  # no split is left empty


def test_the_seed_decides_who_goes_where():
    keys = {i: [str(i)] for i in range(20)}
    one, two = (splits_of(keys, seed, SHARES) for seed in (0, 1))
    assert one != two
    assert Counter(one.values()) == Counter(two.values()) == {"train": 16, "eval": 4}


def test_a_chain_of_shared_images_is_one_group():
    keys = {i: [f"k{i}", f"k{i + 1}"] for i in range(9)} | {"alone": ["x"]}
    found = splits_of(keys, 0, {"train": 1, "eval": 1})
    assert len({found[i] for i in range(9)}) == 1
    assert found["alone"] != found[0]


def test_what_is_fixed_takes_its_group_along():
    keys = {"a": ["1"], "b": ["1", "2"], "c": ["2"], "d": ["3"], "e": ["4"]}
    found = splits_of(keys, 0, SHARES, fixed={"a": "test", "b": "test", "c": "eval"})
    assert [found[k] for k in "abc"] == ["test"] * 3
    assert {found["d"], found["e"]} <= {"train", "eval"}


@pytest.mark.parametrize("shares", [{"all": 1.0}, {"all": 0.3}])
def test_one_split_takes_everything(shares):
    assert set(splits_of({1: ["a"], 2: ["b"]}, 0, shares).values()) == {"all"}
