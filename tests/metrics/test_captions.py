"""CIDEr, BLEU, ROUGE-L and words against the COCO caption evaluation; intervals by redrawing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmtune.metrics.caption_words import caption_words
from mmtune.metrics.captions import CaptionScores, bleu, bleu_counts, cider, rouge_l

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "captions.json").read_text())
SETS = GOLDEN["sets"]


def split(golden):
    captions = [c.split() for c in golden["captions"]]
    return captions, [[r.split() for r in refs] for refs in golden["references"]]


@pytest.mark.parametrize("text", range(len(GOLDEN["words"])))
def test_words(text):
    sentence, words = GOLDEN["words"][text]
    assert " ".join(caption_words(sentence)) == words


@pytest.mark.parametrize("golden", SETS)
def test_each_caption_has_the_score_of_the_coco_evaluation(golden):
    captions, references = split(golden)
    np.testing.assert_allclose(cider(captions, references), golden["cider"], rtol=1e-12, atol=1e-14)
    found = [rouge_l(c, r) for c, r in zip(captions, references, strict=True)]
    np.testing.assert_allclose(found, golden["rouge"], rtol=1e-12)
    total = bleu_counts(captions, references).sum(0, keepdims=True)
    np.testing.assert_allclose(bleu(total)[0], golden["bleu"], rtol=1e-9)
    metrics = CaptionScores(captions, references).metrics(resamples=100)
    assert metrics["CIDEr"].value == pytest.approx(100 * golden["cider_mean"])
    assert metrics["ROUGE-L"].value == pytest.approx(100 * golden["rouge_mean"])
    assert metrics["BLEU-4"].value == pytest.approx(100 * golden["bleu"][3])
    assert all(m.low < m.value < m.high and m.n == len(captions) for m in metrics.values())


def test_closed_forms():
    captions, references = [["a", "b"], ["c", "d"]], [[["a", "b"]], [["c", "d"]]]
    # Bigrams are all there is to a caption of two words: two of four orders are right.
    assert cider(captions, references) == pytest.approx([5, 5])
    assert rouge_l(["a", "b", "c"], [["a", "x", "c", "y"]]) == pytest.approx(
        (1 + 1.44) * (2 / 3) * (1 / 2) / (1 / 2 + 1.44 * 2 / 3)
    )
    assert rouge_l([], [["a"]]) == 0
    short = bleu(bleu_counts([["a", "b"]], [[["a", "b", "c"]]]))[0]
    assert short[:2] == pytest.approx(np.exp(1 - 3 / 2), rel=1e-6)


def test_the_gain_over_itself_is_zero_and_over_worse_captions_clear_of_it():
    captions, references = split(SETS[0])
    good = CaptionScores([refs[0] for refs in references], references)
    bad = CaptionScores(captions, references)
    same = good.metrics(200, minus=good)
    assert all((m.value, m.low, m.high) == (0, 0, 0) for m in same.values())
    gain = good.metrics(200, minus=bad)
    assert all(m.low > 0 for m in gain.values())
    for name, metric in gain.items():
        want = good.metrics(200)[name].value - bad.metrics(200)[name].value
        assert metric.value == pytest.approx(want)


def test_an_image_without_reference_is_refused():
    with pytest.raises(ValueError, match="needs a reference"):
        CaptionScores([["a"], ["b"]], [[["a"]], []])
