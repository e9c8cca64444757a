"""Two-stage evaluation against brute force."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmtune.metrics.recall import rank_queries
from mmtune.tasks.blip_retrieval import RERANKED
from mmtune.tasks.reranking import PairScores, shortlist
from tests.tasks.tiny_blip import ENCODE, adapted, make_task, tiny_blip


def doubled(name):
    """Some images share a caption."""
    return [name, "dark thing" if "dark" in name else f"{name} again"]


def brute_force(task, model, split, count):
    """[c, n] scores: all pairs read together one by one; outside the shortlist by cosine - 1000."""
    gallery, view = task.gallery_of(split), task.loaded.backbone
    parts = view.matching(model, ENCODE)
    with torch.no_grad():
        pixels = next(task._pixels(model, gallery.records))
        tokens = [task.loaded.tokenize([c]) for c in gallery.captions]
        images = view.encode_image(model, pixels)
        texts = torch.cat([view.encode_text(model, **t) for t in tokens])
        states = parts.image_states(pixels)
        match = torch.tensor(
            [
                [float(parts.logits(parts.fused(*t.values(), s[None]))[0, 1]) for s in states]
                for t in tokens
            ]
        )
    cosine = (texts @ images.T).double().numpy()
    both = cosine + match.double().numpy()
    distinct = {c: i for i, c in reversed(list(enumerate(gallery.captions)))}
    to_images = np.full_like(both, 0)
    for c, row in enumerate(cosine):
        kept = np.argsort(-row)[:count]
        to_images[c] = row - 1000
        to_images[c, kept] = both[c, kept]
    to_texts = np.full_like(both.T, 0)
    for i, row in enumerate(cosine.T):
        first = sorted(distinct.values(), key=lambda c: -row[c])[:count]
        names = {gallery.captions[c] for c in first}
        for c, caption in enumerate(gallery.captions):
            to_texts[i, c] = both[c, i] if caption in names else row[c] - 1000
    return to_images, to_texts


@pytest.mark.parametrize("identical", ["positive", "distinct"])
@pytest.mark.parametrize(("count", "batch"), [(3, 2), (5, 128), (50, 7)])
def test_reranked_ranks_are_those_of_brute_force(tmp_path, identical, count, batch):
    task = make_task(tmp_path, doubled, identical=identical, rerank=count, eval_batch_size=batch)
    task.loaded.backbone.prepare()
    model = task.loaded.model
    found = task.evaluate(model, progress=False)
    task.settings = replace(task.settings, eval_batch_size=128)  # all images at once
    to_images, to_texts = brute_force(task, model, "test", count)
    gallery = task.gallery_of("test")
    ranks = found.details["ranks"][RERANKED]
    for got, scores, right in (
        (ranks.txt2img, to_images, gallery.images_of),
        (ranks.img2txt, to_texts, gallery.captions_of),
    ):
        # Equal captions tie exactly, others must not: rounding says what is equal.
        want = rank_queries(np.round(scores, 5), right)
        for name in ("above", "tied_wrong", "tied_right"):
            assert np.array_equal(getattr(got, name), getattr(want, name)), name
    # Reading pairs together changes something here.
    first = found.details["ranks"][""]
    assert not np.array_equal(first.txt2img.above, ranks.txt2img.above)


def test_both_stages_are_labelled_apart_and_compared(tmp_path):
    task = make_task(tmp_path, rerank=4)
    one = task.evaluate(tiny_blip(1).model, progress=False)
    two = task.evaluate(tiny_blip(2).model, progress=False)
    plain = [n for n in one.metrics if not n.endswith(RERANKED)]
    assert list(one.metrics) == plain + [f"{n}{RERANKED}" for n in plain]
    assert "txt2img R@1 (re-ranked)" in one.metrics
    assert one.primary == "mean (re-ranked)"
    # What is not shortlisted is found no sooner: recall at the length of the list stays.
    for ranks in (one.details["ranks"], two.details["ranks"]):
        assert np.array_equal(ranks[""].txt2img.hits(4), ranks[RERANKED].txt2img.hits(4))
    gain = task.compare(one, two)
    assert list(gain) == list(one.metrics)
    for name, metric in gain.items():
        want = two.metrics[name].value - one.metrics[name].value
        assert metric.value == pytest.approx(want, abs=1e-9)
        assert metric.low <= metric.high
    titles = [item.title for item in task.gallery(one, two)]
    ranks = [e.details["ranks"][RERANKED].txt2img.ranks() for e in (one, two)]
    moves = {f"text to image: rank {a:g} → {b:g}" for a, b in zip(*ranks, strict=True)}
    assert titles
    assert {t for t in titles if t.startswith("text")} <= moves


def test_without_the_second_stage_metrics_are_those_of_the_features(tmp_path):
    task = make_task(tmp_path, rerank=0)
    found = task.evaluate(task.loaded.model, progress=False)
    both = make_task(tmp_path, rerank=3, loaded=task.loaded)
    again = both.evaluate(task.loaded.model, progress=False)
    assert found.primary == "mean"
    assert found.metrics == {n: m for n, m in again.metrics.items() if not n.endswith(RERANKED)}
    assert not any("re-ranked" in name for name in found.metrics)


def test_every_pair_is_read_once(tmp_path, monkeypatch):
    from mmtune.backbones.blip_matching import Matching

    task = make_task(tmp_path, doubled, rerank=4, eval_batch_size=3)
    read = []
    fused = Matching.fused

    def counting(self, ids, mask, states):
        assert len(states) == 1
        read.extend(
            (states[0, 0, 0].item(), tuple(i[m > 0].tolist()))
            for i, m in zip(ids, mask, strict=True)
        )
        assert len(ids) <= 3
        assert mask[:, -1].any()  # no wider than the longest
        return fused(self, ids, mask, states)

    monkeypatch.setattr(Matching, "fused", counting)
    task.evaluate(task.loaded.model, progress=False)
    assert len(read) == len(set(read))
    assert 8 * 4 <= len(read) < 8 * 4 + 13 * 4  # shortlists of images and distinct texts overlap


def test_pair_scores_are_found_by_image_and_text():
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(n, 5, generator=generator) for n in (6, 9))
    images, texts = (torch.nn.functional.normalize(x, dim=1) for x in (images, texts))
    texts_of, images_of = shortlist(images, texts, 4), shortlist(texts, images, 40)
    assert (texts_of.shape, images_of.shape) == ((6, 4), (9, 6))
    cosine = images @ texts.T
    assert torch.equal(texts_of, cosine.topk(4).indices)
    pairs = PairScores.of_shortlists(texts_of, images_of)
    assert torch.equal(pairs.keys, torch.arange(54))  # every pair is in the second list
    pairs.scores.copy_(cosine.flatten())
    i, t = torch.arange(6)[:, None], torch.arange(9)[:, None]
    assert torch.equal(pairs.of(i, texts_of), cosine.gather(1, texts_of))
    assert torch.equal(pairs.of(images_of, t), cosine.T.gather(1, images_of))


def test_adapted_model_is_evaluated_like_its_base_at_first(tmp_path):
    task = make_task(tmp_path, rerank=4)
    before = task.evaluate(task.loaded.model, progress=False)
    model = adapted(task, "lora").train()
    after = task.evaluate(model, progress=False)
    assert model.training
    assert after.metrics == before.metrics
