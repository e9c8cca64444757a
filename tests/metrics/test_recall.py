from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.metrics.recall import (
    RetrievalRanks,
    Scores,
    captions_by_image,
    paired_differences,
    rank_queries,
    retrieval_metrics,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "retrieval_metrics.npz"


def both(scores_t2i, scores_i2t, owner, **options):
    owner = np.asarray(owner)
    return RetrievalRanks(
        rank_queries(scores_t2i, [[int(i)] for i in owner], **options),
        rank_queries(scores_i2t, captions_by_image(owner, len(scores_i2t)), **options),
        owner,
    )


@pytest.mark.parametrize("case", [0, 1, 2])
@pytest.mark.parametrize("chunk", [3, 10_000])
def test_golden(case, chunk):
    with np.load(GOLDEN, allow_pickle=False) as golden:
        ranks = both(
            golden[f"{case}/scores_t2i"],
            golden[f"{case}/scores_i2t"],
            golden[f"{case}/txt2img"],
            chunk=chunk,
        )
        expected = golden[f"{case}/metrics"]
    found = retrieval_metrics(ranks, resamples=100)
    txt = [found[f"img2txt R@{k}"].value for k in (1, 5, 10)]
    img = [found[f"txt2img R@{k}"].value for k in (1, 5, 10)]
    ours = [*txt, np.mean(txt), *img, np.mean(img), found["mean"].value]
    assert np.abs(np.array(ours) - expected).max() < 1e-9
    assert abs(found["RSum"].value - sum(txt) - sum(img)) < 1e-9
    assert abs(found["mean R@1"].value - (txt[0] + img[0]) / 2) < 1e-9


def test_hand_counted_ranks():
    scores = np.array([[0.9, 0.1, 0.5], [0.2, 0.8, 0.3], [0.7, 0.6, 0.5]], np.float32)
    ranks = rank_queries(scores, [[0], [0], [1, 2]], top=2)
    assert ranks.ranks().tolist() == [1, 3, 2]
    assert ranks.hits(1).tolist() == [1, 0, 0]
    assert ranks.hits(2).tolist() == [1, 0, 1]
    assert ranks.top.tolist() == [[0, 2], [1, 2], [0, 1]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=6).flatmap(
        lambda scores: st.tuples(
            st.just(scores),
            st.sets(st.integers(0, len(scores) - 1), min_size=1),
            st.integers(1, 7),
        )
    )
)
def test_ties_are_the_mean_over_all_orders(case):
    scores, right, k = case
    hits, ranks = [], []
    for order in itertools.permutations(range(len(scores))):
        listed = sorted(order, key=lambda i: -scores[i])  # stable: the order breaks ties
        first = next(n for n, i in enumerate(listed) if i in right)
        hits.append(first < k)
        ranks.append(first + 1)
    found = rank_queries(np.array([scores], np.float32), [sorted(right)])
    assert found.hits(k)[0] == pytest.approx(np.mean(hits), abs=1e-12)
    assert found.ranks()[0] == pytest.approx(np.mean(ranks), abs=1e-12)


def test_constant_scores_are_chance():
    ranks = both(np.zeros((40, 40)), np.zeros((40, 40)), range(40))
    found = retrieval_metrics(ranks, resamples=100)
    for k in (1, 5, 10):
        assert found[f"txt2img R@{k}"].value == pytest.approx(100 * k / 40)
    assert found["txt2img MdR"].value == pytest.approx(20.5)


def test_embeddings_are_scored_in_chunks_as_a_matrix_is():
    g = torch.Generator().manual_seed(0)
    queries, answers = torch.randn(50, 8, generator=g), torch.randn(30, 8, generator=g)
    right = [[i % 30] for i in range(50)]
    whole = rank_queries(queries @ answers.T, right)
    done = []
    parts = rank_queries(Scores(queries, answers), right, chunk=7, progress=done.append)
    assert np.array_equal(whole.ranks(), parts.ranks())
    assert sum(done) == 50


@pytest.mark.parametrize(
    ("scores", "right", "message"),
    [
        (np.zeros((2, 3)), [[0]], "2 rows of scores, but right answers for 1"),
        (np.zeros((2, 3)), [[0], []], "1 queries have no right answer; the first is 1"),
        (np.array([[0.0, np.nan]]), [[0]], "not finite"),
    ],
)
def test_bad_scores_are_refused(scores, right, message):
    with pytest.raises(ValueError, match=message):
        rank_queries(scores, right)


def random_ranks(images, captions, boost, seed):
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(images), captions)
    scores = rng.standard_normal((images * captions, images))
    scores[np.arange(len(owner)), owner] += boost
    return both(scores, scores.T.copy(), owner)


def test_interval_has_the_width_of_a_proportion():
    # One caption an image: the bootstrap of a mean of n independent hits is known in closed form.
    found = retrieval_metrics(random_ranks(400, 1, 3.0, 0), resamples=4000)["txt2img R@1"]
    p = found.value / 100
    expected = 2 * 1.96 * 100 * np.sqrt(p * (1 - p) / 400)
    assert found.high - found.low == pytest.approx(expected, rel=0.06)
    assert found.low < found.value < found.high
    assert found.n == 400


def test_captions_of_an_image_are_one_cluster():
    # Five copies of every caption say nothing new, so the interval must not shrink.
    one = random_ranks(200, 1, 3.0, 1)
    copies = RetrievalRanks(
        type(one.txt2img)(
            *(np.repeat(getattr(one.txt2img, n), 5, axis=0) for n in vars(one.txt2img))
        ),
        one.img2txt,
        np.repeat(one.owner, 5),
    )
    a, b = (retrieval_metrics(r)["txt2img R@1"] for r in (one, copies))
    assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high))
    assert b.n == 1000


def test_paired_difference_is_narrower_than_unpaired_and_signed():
    before, after = random_ranks(300, 2, 2.0, 2), random_ranks(300, 2, 2.0, 2)
    same = paired_differences(before, after)
    for metric in same.values():
        assert (metric.value, metric.low, metric.high) == (0, 0, 0)
    better = random_ranks(300, 2, 2.5, 2)  # the same noise, so most queries agree
    gain = paired_differences(before, better)["txt2img R@1"]
    one, two = (retrieval_metrics(r)["txt2img R@1"] for r in (before, better))
    assert gain.value == pytest.approx(two.value - one.value)
    assert gain.low > 0
    assert gain.high - gain.low < (one.high - one.low)
    assert list(paired_differences(before, better)) == list(retrieval_metrics(before))
    assert paired_differences(before, better)["txt2img MdR"].value <= 0


def test_differences_of_other_queries_are_refused():
    with pytest.raises(ValueError, match="different queries"):
        paired_differences(random_ranks(10, 2, 2.0, 0), random_ranks(20, 1, 2.0, 0))


def test_reproducible():
    ranks = random_ranks(50, 2, 2.0, 0)
    assert retrieval_metrics(ranks) == retrieval_metrics(ranks)
