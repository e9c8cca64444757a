"""Averages over records: golden numbers, images drawn whole, pairs, what is missing."""

from __future__ import annotations

import numpy as np
import pytest

from editing.metrics.aggregate import (
    Score,
    exact,
    joined_score,
    macro,
    micro,
    overall,
    paired,
    summarize,
)
from editing.metrics.definitions import AGREEMENT, DIVERGENCE, TOKEN_ACCURACY

from . import golden

GOLDEN = golden.settings("aggregate")
ROWS, EXPECTED = GOLDEN["rows"], GOLDEN["expected"]
IMAGES, GROUPS = [r["image"] for r in ROWS], [r["group"] for r in ROWS]
NAMES = [f"{method}.{metric}" for method in "AB" for metric in GOLDEN["metrics"]]
near = {"rel": 0, "abs": 1e-9}


def scores(name):
    found = [(r[f"{name}.hits"], r[f"{name}.n"]) for r in ROWS]
    return [None if n is None else Score(hits, n) for hits, n in found]


def interval(metric):
    return [metric.low, metric.high]


@pytest.mark.parametrize("name", NAMES)
def test_summaries(name):
    want = EXPECTED[name]
    found = summarize(TOKEN_ACCURACY, scores(name), None, GROUPS)
    assert (found.n, found.missing) == (want["n_records"], want["n_missing"])
    assert found.images == found.n == found.macro.n
    assert found.macro.value == pytest.approx(want["macro"], **near)
    assert found.micro.value == pytest.approx(want["micro"], **near)
    assert found.exact is not None
    assert found.exact.value == pytest.approx(want["exact"], **near)
    assert found.groups == pytest.approx(want["group_means"], **near)
    assert found.group_macro == pytest.approx(want["group_macro"], **near)
    assert found.std_error == pytest.approx(want["std_error"], **near)
    assert interval(found.macro) == pytest.approx(want["ci95_macro"], **near)
    assert interval(found.micro) == pytest.approx(want["ci95_micro"], **near)
    assert macro(scores(name)) == pytest.approx(want["macro"], **near)
    assert micro(scores(name)) == pytest.approx(want["micro"], **near)
    assert exact(scores(name)) == pytest.approx(want["exact"], **near)


@pytest.mark.parametrize("name", NAMES)
def test_summaries_over_images(name):
    want = EXPECTED[name]
    found = summarize(TOKEN_ACCURACY, scores(name), IMAGES, GROUPS)
    assert found.images == want["n_clusters"]
    assert found.macro.value == pytest.approx(want["macro"], **near)
    assert interval(found.macro) == pytest.approx(want["ci95_cluster_by_image"], **near)


@pytest.mark.parametrize("metric", GOLDEN["metrics"])
def test_paired_differences(metric):
    want = GOLDEN["paired_A_minus_B"][metric]
    first, second = scores(f"A.{metric}"), scores(f"B.{metric}")
    found = paired(first, second, None)
    assert found.macro.n == want["n"]
    assert found.macro.value == pytest.approx(want["mean_difference"], **near)
    assert interval(found.macro) == pytest.approx(want["ci95"], **near)
    share = want["share_of_resamples_not_above_zero"]
    assert found.not_above_zero == pytest.approx(share, **near)
    turned = paired(second, first, None).macro
    assert [turned.low, turned.high] == pytest.approx([-found.macro.high, -found.macro.low])


@pytest.mark.parametrize("method", "AB")
def test_overall(method):
    want = EXPECTED[f"{method}.overall"]
    values = [macro(scores(f"{method}.{metric}")) for metric in GOLDEN["metrics"]]
    found = overall(values)
    assert found[0] == pytest.approx(want["arithmetic_mean"], **near)
    assert found[1] == pytest.approx(want["harmonic_mean"], **near)


def test_degenerate():
    want = GOLDEN["degenerate"]
    ones = [Score(v, 1) for v in want["all_ones"]["values"]]
    found = summarize(TOKEN_ACCURACY, ones, None).macro
    assert (found.value, interval(found)) == (want["all_ones"]["macro"], want["all_ones"]["ci95"])
    zero = want["harmonic_with_zero"]
    assert overall(zero["values"])[1] == zero["result"]
    single = summarize(TOKEN_ACCURACY, [Score(1, 2)], ["a"])
    assert (single.macro.low, single.macro.value, single.macro.high) == (0.5, 0.5, 0.5)
    assert single.std_error is None


def test_records_of_one_image_are_drawn_together():
    rng = np.random.default_rng(5)
    alone = [Score(float(v), 1) for v in rng.random(60)]
    names = [f"{i:02}" for i in range(60)]
    once = summarize(AGREEMENT, alone, names)
    # Every record three times: nothing is known that was not known before.
    thrice = summarize(AGREEMENT, alone * 3, names * 3)
    for one, three in ((once.macro, thrice.macro), (once.micro, thrice.micro)):
        assert interval(three) == pytest.approx(interval(one))
    naive = summarize(AGREEMENT, alone * 3, None).macro
    wide = once.macro.high - once.macro.low
    assert naive.high - naive.low == pytest.approx(wide / 3**0.5, rel=0.15)


def test_missing_records_leave_their_images_out():
    values = [Score(1, 1), None, Score(0, 1), None]
    found = summarize(TOKEN_ACCURACY, values, ["a", "b", "a", "a"], ["x", "y", "x", "x"])
    assert (found.n, found.missing, found.images, found.groups) == (2, 2, 1, {"x": 0.5})
    assert interval(found.macro) == [0.5, 0.5]


def test_only_shares_have_an_exact_one():
    assert summarize(DIVERGENCE, [Score(1.0, 1), Score(0.3, 2)], None).exact is None


def test_probes_of_a_record_are_joined_over_their_tokens():
    assert joined_score([Score(1, 2), None, Score(3, 4)]) == Score(4, 6)
    assert joined_score([None]) is None


def test_refusals():
    with pytest.raises(ValueError, match="none of 2 records"):
        summarize(TOKEN_ACCURACY, [None, None], None)
    with pytest.raises(ValueError, match="each of 2 records, got 3"):
        summarize(TOKEN_ACCURACY, [Score(1, 1)] * 2, ["a"] * 3)
    with pytest.raises(ValueError, match="use None"):
        Score(0, 0)
    with pytest.raises(ValueError, match="none of 1 records"):
        paired([Score(1, 1)], [None], None)
