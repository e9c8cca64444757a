"""Token accuracy, losses and written answers: golden numbers, gradients, ends, refusals."""

from __future__ import annotations

import pytest
import torch

from editing.metrics.aggregate import Score, exact, macro, micro
from editing.metrics.answers import AnswerTokens, answer_nll, answer_scores, generated_match
from editing.metrics.definitions import NLL, PROBABILITY, TOKEN_ACCURACY
from editing.metrics.mmedit import Quality, quality, tail_labels, tail_quality

from . import golden
from .golden import IGNORED, LOGS, SHARE, close

GOLDEN, ARRAYS = golden.settings("token_accuracy")["cases"], golden.Arrays("token_accuracy")
PROBABILITIES = golden.PROBABILITY


def case(name):
    return ARRAYS[name, "logits"], ARRAYS[name, "labels"]


@pytest.mark.parametrize("name", GOLDEN)
def test_ours(name):
    want = GOLDEN[name]["expected"]
    tokens = AnswerTokens.of_sequence(*case(name))
    scores = answer_scores(tokens)
    hits, nll, probability = scores[TOKEN_ACCURACY], scores[NLL], scores[PROBABILITY]
    assert len(tokens.ids) == want["n_tokens"]
    assert [s.n if s else 0 for s in hits] == want["row_n_tokens"]
    right = [None if s is None else s.total == s.n for s in hits]
    assert right == want["row_exact_match"]
    for found, key, tolerance in (
        (hits, "token_acc", SHARE),
        (nll, "nll", LOGS),
        (probability, "prob", PROBABILITIES),
    ):
        close([s and s.value for s in found], want[f"row_{key}"], tolerance)
        close(micro(found), want[f"{key}_micro"], tolerance)
        close(macro(found), want[f"{key}_macro"], tolerance)
    close([s and -s.total for s in nll], want["row_seq_logprob"], LOGS)
    close(exact(hits), want["exact_match"], SHARE)
    close(float(answer_nll(tokens)), want["nll_micro"], LOGS)


def same_quality(found: Quality, want):
    close(found.accuracy, want["acc"], SHARE)
    close(found.nll, want["nll"], LOGS)
    close(found.probability, want["prob"], PROBABILITIES)


@pytest.mark.parametrize("name", GOLDEN)
def test_mmedit(name):
    want = GOLDEN[name]["reference"]
    for off_by_one, key in ((False, "shifted"), (True, "unshifted_off_by_one")):
        found = quality(*case(name), off_by_one=off_by_one)
        same_quality(found, want[key])
        close(-found.nll, want[key]["log_prob"], LOGS)
        assert found.tokens == want[key]["n_tokens"]
    close(quality(*case(name)).exact_match, want["shifted_exact_match"]["acc"], SHARE)


def test_mmedit_scores_targets_at_the_end_without_labels():
    logits, labels = case("r3_batch_equal")
    targets = ARRAYS["r3_batch_equal", "tail_targets"]
    same_quality(
        tail_quality(logits, targets),
        GOLDEN["r3_batch_equal"]["reference_text_only_tail_targets"],
    )
    assert tail_quality(logits, targets) == quality(logits, labels)


@pytest.mark.parametrize("name", ["r4_left_padding", "r5_right_padding"])
def test_mmedit_puts_labels_at_the_end_whatever_the_padding(name):
    logits, labels = case(name)
    targets = [row[row != IGNORED].tolist() for row in labels]
    found = tail_labels(targets, labels.shape[1])
    assert torch.equal(found, ARRAYS[name, "labels_reference_tail"])
    assert torch.equal(found, labels) is GOLDEN[name]["tail_labels_equal_correct_labels"]
    want = GOLDEN[name]["reference_on_tail_labels"]
    same_quality(quality(logits, found), want["shifted"])
    same_quality(quality(logits, found, off_by_one=True), want["unshifted_off_by_one"])
    close(quality(logits, found).exact_match, want["shifted_exact_match"]["acc"], SHARE)


def test_an_image_in_front_moves_labels_and_nothing_else():
    logits, labels = case("r7_image_prefix")
    text = ARRAYS["r7_image_prefix", "labels_text"]
    image = labels.shape[1] - text.shape[1]
    whole = AnswerTokens.of_sequence(logits, labels)
    alone = AnswerTokens.of_sequence(logits[:, image:], text)
    assert torch.equal(whole.ids, alone.ids)
    assert torch.equal(whole.logits, alone.logits)


def test_scores_beside_their_tokens_equal_those_of_the_sequence():
    logits, labels = case("r4_left_padding")
    whole = AnswerTokens.of_sequence(logits, labels)
    ids = torch.full((4, 5), 7)
    mask = torch.zeros_like(ids)
    beside = torch.zeros(4, 5, logits.shape[-1])
    for i in range(4):
        own = whole.rows == i
        count = int(own.sum())
        ids[i, :count], mask[i, :count] = whole.ids[own], 1
        beside[i, :count] = whole.logits[own]
    found = AnswerTokens.of_targets(beside, ids, mask)
    for field in ("ids", "rows", "logits"):
        assert torch.equal(getattr(found, field), getattr(whole, field))


def test_gradients():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[IGNORED, IGNORED, 3, 1, IGNORED], [IGNORED, 2, IGNORED, 0, 6]])
    nll = lambda x: answer_nll(AnswerTokens.of_sequence(x, labels))  # noqa: E731
    assert torch.autograd.gradcheck(nll, logits)
    (gradient,) = torch.autograd.grad(nll(logits), logits)
    scored = torch.zeros(2, 5, dtype=torch.bool)
    scored[0, [1, 2]] = scored[1, [0, 2, 3]] = True
    assert torch.equal(gradient.ne(0).any(-1), scored)


def test_low_precision_scores_are_summed_in_float32():
    logits, labels = case("r2_long_prompt")
    low = AnswerTokens.of_sequence(logits.bfloat16(), labels)
    exactly = AnswerTokens.of_sequence(logits.bfloat16().float(), labels)
    assert low.log_probabilities().dtype == torch.float32
    assert torch.equal(low.log_probabilities(), exactly.log_probabilities())


def test_refusals():
    with pytest.raises(ValueError, match=r"got \[1, 2, 3\], \[1, 4\]"):
        AnswerTokens.of_targets(torch.zeros(1, 2, 3), torch.zeros(1, 4), torch.ones(1, 4))
    empty = AnswerTokens.of_sequence(torch.zeros(1, 3, 5), torch.full((1, 3), IGNORED))
    with pytest.raises(ValueError, match="at least one answer token"):
        answer_nll(empty)
    with pytest.raises(ValueError, match="at least one answer token"):
        quality(torch.zeros(1, 3, 5), torch.full((1, 3), IGNORED))
    assert answer_scores(empty)[TOKEN_ACCURACY] == [None]


@pytest.mark.parametrize(
    ("written", "target", "match"),
    [
        ("a red Bus.", "red bus", 1),
        ("two", "2", 1),
        ("red", "red bus", 0),
        ("red bus stop", "red bus", 0),
        ("", "red bus", 0),
        ("?", "?", 1),
        ("!", "?", 0),
        ("the", "A", 0),
        (" A", "A", 1),
    ],
)
def test_written_answers(written, target, match):
    assert generated_match(written, target) == Score(match, 1)


def test_an_empty_target_is_refused():
    with pytest.raises(ValueError, match="empty target"):
        generated_match("anything", " ")
