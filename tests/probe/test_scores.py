import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from mmtune.probe.outcomes import Outcome
from mmtune.probe.scores import cell, mcnemar, paired, pope_cell, together
from tests.probe.sets import item


def outcome(name, answer, right, error="", **known):
    return Outcome("m", "simple", name, "q", "d", answer or "", error, answer=answer,
                   right=None if error else right, **known)  # fmt: skip


def test_pope_counts():
    """2 true yes, 1 missed, 1 invented, 1 true no, 1 not understood (truth yes)."""
    truth = {"a": "yes", "b": "yes", "c": "yes", "d": "no", "e": "no", "f": "yes"}
    said = {"a": "yes", "b": "yes", "c": "no", "d": "yes", "e": "no", "f": None}
    items = {n: item(n, t, image=f"{n}.png") for n, t in truth.items()}
    found = cell(items, [outcome(n, said[n], int(said[n] == t)) for n, t in truth.items()])
    assert found.precision == 2 / 3
    assert found.recall == 2 / 4
    assert found.f1 == pytest.approx(2 * 2 / (3 + 4))
    assert found.yes == 3 / 6
    assert found.unparsed == 1 / 6
    assert found.accuracy.value == 3 / 6


def test_popes_own_counts():
    """What is no "no" is a yes, of the first sentence alone; other kinds of items do not count."""
    said = {"a": ("yes", "Hm."), "b": ("yes", "I do not know. Yes."), "c": ("no", "A dog."),
            "d": ("no", "No, it is red."), "e": ("no", "Answer: no")}  # fmt: skip
    items = {n: item(n, truth, image=f"{n}.png") for n, (truth, _) in said.items()}
    items["f"] = item("f", "a dog", image="f.png")
    outcomes = [outcome(n, None, 0) for n in items]
    outcomes = [replace(o, reply=said.get(o.item, ("", "a dog"))[1]) for o in outcomes]
    found = pope_cell(items, [*outcomes, outcome("a", None, None, "timed out")])
    assert (found.accuracy.value, found.accuracy.n, found.failed) == (3 / 5, 5, 1)
    assert (found.precision, found.recall, found.f1, found.yes) == (1 / 2, 1 / 2, 1 / 2, 2 / 5)


def test_failed_requests_do_not_count():
    items = {n: item(n) for n in "ab"}
    found = cell(items, [outcome("a", "yes", 1), outcome("b", None, None, "timed out")])
    assert (found.failed, found.accuracy.n, found.accuracy.value) == (1, 1, 1.0)
    assert cell(items, [outcome("b", None, None, "x")]).accuracy is None


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_binomial_test(better, worse):
    want = binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert mcnemar(better, worse) == pytest.approx(want)


def test_pairs_are_of_items_that_both_answered():
    items = {n: item(n, image=f"{n}.png") for n in "abcd"}
    now = [outcome(n, "yes", r) for n, r in zip("abcd", (1, 1, 0, 1), strict=True)]
    then = [outcome("a", "no", 0), outcome("b", "yes", 1), outcome("c", "yes", 1),
            outcome("d", None, None, "failed")]  # fmt: skip
    found = paired(items, now, then)
    assert (found.n, found.better, found.worse) == (3, 1, 1)
    assert found.difference.value == 0
    assert found.kept == 2 / 3  # b and c, of which only b counts as right twice
    assert paired(items, now, []) is None


def test_replies_that_say_nothing_are_kept_where_they_are_the_same():
    items = {n: item(n, image=f"{n}.png") for n in "abc"}
    now = [
        Outcome("m", "simple", n, "q", "d", r, right=0) for n, r in zip("abc", "xyz", strict=True)
    ]
    then = [
        Outcome("m", "simple", n, "q", "d", r, right=0) for n, r in zip("abc", "xyw", strict=True)
    ]
    assert paired(items, now, then).kept == 2 / 3


def test_groups():
    items = {
        **{n: item(n, "yes", pair_id="s", relation="same") for n in "ab"},
        **{n: item(n, "yes", pair_id="t", relation="same") for n in "cd"},
        "e": item("e", "yes", pair_id="f", relation="flip"),
        "f": item("f", "no", pair_id="f", relation="flip"),
        "g": item("g", "yes", pair_id="alone", relation="flip"),
    }
    said = dict(zip("abcdefg", ("no", "no", "yes", "no", "yes", "no", "yes"), strict=True))
    outcomes = [outcome(n, a, int(items[n].answer == a)) for n, a in said.items()]
    for order in itertools.islice(itertools.permutations(outcomes), 0, 200, 37):
        found = together(items, order)
        assert found.same == 1 / 2
        assert found.flipped == 1
        assert found.all_right == 1 / 3
        assert found.groups == {"same": 2, "flip": 1}


def test_intervals_are_over_images():
    """Four questions about one image are one draw: no spread."""
    items = {n: item(n, image="one.png") for n in "abcd"}
    found = cell(items, [outcome(n, "yes", r) for n, r in zip("abcd", (1, 1, 0, 1), strict=True)])
    assert (found.accuracy.low, found.accuracy.high) == (0.75, 0.75)
