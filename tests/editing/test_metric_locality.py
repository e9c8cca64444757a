"""Locality: golden numbers of ours and of MMEdit, gradients, answers that are not the same."""

from __future__ import annotations

import pytest
import torch

from editing.metrics.aggregate import exact, macro, micro
from editing.metrics.answers import AnswerTokens
from editing.metrics.definitions import (
    AGREEMENT,
    DIVERGENCE,
    definitions_of,
    ordered_definition,
    overlap_definition,
)
from editing.metrics.locality import (
    agreement,
    divergence,
    kl,
    locality_scores,
    overlap,
)
from editing.metrics.mmedit import IMAGE_TOP, TEXT_TOP, masked_divergence, ordered_top

from . import golden
from .golden import IGNORED, LOGS, SHARE, close

GOLDEN, ARRAYS = golden.settings("locality")["cases"], golden.Arrays("locality")


def both(name):
    return (
        AnswerTokens.of_sequence(ARRAYS[name, "pre"], ARRAYS[name, "labels_pre"]),
        AnswerTokens.of_sequence(ARRAYS[name, "post"], ARRAYS[name, "labels_post"]),
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_ours(name):
    want = GOLDEN[name]["expected"]
    before, after = both(name)
    assert len(before.ids) == want["n_answer_tokens"]
    assert agreement(before, after).tolist() == want["token_agree"]
    close(divergence(before, after).tolist(), want["token_kl"], LOGS)
    scores = locality_scores(before, after, ordered=(10,))
    close(micro(scores[AGREEMENT]), want["argmax_agreement"], SHARE)
    close(exact(scores[AGREEMENT]), want["sequence_agreement"], SHARE)
    for k in (5, 10):
        close(micro(scores[overlap_definition(k)]), want[f"top{k}_overlap"], SHARE)
    close(micro(scores[ordered_definition(10)]), want["top10_ordered_match_answer"], SHARE)
    close(micro(scores[DIVERGENCE]), want["kl_pre_post_nats"], LOGS)


@pytest.mark.parametrize("name", GOLDEN)
def test_mmedit(name):
    want = GOLDEN[name]["reference"]
    before, after = ARRAYS[name, "pre"], ARRAYS[name, "post"]
    found = macro(ordered_top(before, after, TEXT_TOP))
    close(found, want["text_top1_all_positions"], SHARE)
    found = macro(ordered_top(before, after, IMAGE_TOP))
    close(found, want["image_top10_ordered_all_positions"], SHARE)
    key = "kl_pre_post_attention_mask_mean"
    assert (key in want) == ((name, "attention_mask") in ARRAYS)
    if key in want:
        mask = ARRAYS[name, "attention_mask"]
        close(float(masked_divergence(before, after, mask)), want[key], LOGS)


def test_overlap_ignores_order_and_is_over_the_vocabulary_where_that_is_smaller():
    before, after = (
        AnswerTokens(torch.tensor([row]), torch.tensor([0]), torch.tensor([0]), 1)
        for row in ([4.0, 3.0, 2.0, 1.0], [3.0, 4.0, 1.0, 2.0])
    )
    assert [float(overlap(before, after, k)) for k in (1, 2, 3, 4, 99)] == [
        0,
        1,
        pytest.approx(2 / 3),
        1,
        1,
    ]


def test_gradients():
    torch.manual_seed(1)
    before, after = (torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True) for _ in "ab")
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert torch.autograd.gradcheck(kl, (before, after))
    assert torch.autograd.gradcheck(lambda x: masked_divergence(before.detach(), x, mask), after)


def test_a_token_that_never_had_a_chance_counts_nothing():
    before = torch.tensor([[1.0, 2.0, -torch.inf]])
    after = torch.tensor([[2.0, 1.0, -torch.inf]], requires_grad=True)
    value = kl(before, after)
    torch.testing.assert_close(value, kl(before[:, :2], after[:, :2]))
    assert value.item() > 0
    (gradient,) = torch.autograd.grad(value.sum(), after)
    (alone,) = torch.autograd.grad(kl(before[:, :2], after[:, :2]).sum(), after)
    torch.testing.assert_close(gradient, alone)


def test_other_answers_are_refused():
    logits = torch.randn(2, 4, 9)
    labels = torch.tensor([[IGNORED, IGNORED, 3, 4], [IGNORED, IGNORED, IGNORED, 5]])
    tokens = AnswerTokens.of_sequence(logits, labels)
    moved = labels.clone()
    moved[0, 2] = 6
    shorter = labels.clone()
    shorter[0, 2] = IGNORED
    others = [
        AnswerTokens.of_sequence(logits, moved),
        AnswerTokens.of_sequence(logits, shorter),
        AnswerTokens.of_sequence(logits[..., :8], labels),
        AnswerTokens.of_sequence(logits[:1], labels[:1]),
    ]
    for other in others:
        with pytest.raises(ValueError, match="same answer tokens"):
            locality_scores(tokens, other)
    with pytest.raises(ValueError, match="k must be at least 1"):
        overlap(tokens, tokens, 0)


def test_every_kind_says_its_definitions():
    kinds = ("reliability", "text_generality", "image_generality", "portability")
    for kind in kinds:
        names = [d.name for d in definitions_of(kind)]
        assert names == ["generated exact match", "token accuracy"]
        assert [d.name for d in definitions_of(kind, "mmedit")] == ["mmedit: token accuracy"]
    before, after = both("l1_small_change")
    found = locality_scores(before, after)
    for kind in ("text_locality", "image_locality"):
        assert [*found] == [*definitions_of(kind)]
        (compat,) = definitions_of(kind, "mmedit")
        assert compat.name.startswith("mmedit: ")
        assert compat.name.endswith("all positions")
