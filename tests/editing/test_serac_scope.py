"""SERAC's scope and mixture: golden numbers, gradients, edges of the similarity."""

from __future__ import annotations

import math

import pytest
import torch

from editing.methods.serac_scope import (
    REFERENCE_EPS,
    aligned,
    best,
    counterfactual_context,
    edit_text,
    log_similarities,
    mixture,
    question_text,
    switched,
)
from editing.metrics.mmedit import quality

from . import golden
from .golden import LOGS, SHARE, SIMILARITY, close

SETTINGS = golden.settings("serac")["cases"]
ARRAYS = golden.Arrays("serac")
CASES = [name for name in SETTINGS if name != "scalar_examples"]


def scope(name):
    given = SETTINGS[name]
    plain = "square" if given["square"] else "euclidean"
    return log_similarities(
        ARRAYS[name, "test_embed"],
        ARRAYS[name, "cache_embed"],
        distance="cosine" if given["cosine"] else plain,
        heads=given["heads"],
        tanh=given["tanh"],
        scale=given["scale"],
    )


def same(found, want, tolerance):
    torch.testing.assert_close(found, want, **tolerance)


@pytest.mark.parametrize("name", CASES)
def test_scope(name):
    found = scope(name)
    same(found, ARRAYS[name, "out_logsim"], SIMILARITY)
    chosen = best(found)
    assert torch.equal(chosen.index, ARRAYS[name, "out_index"])
    same(chosen.log_similarity.exp(), ARRAYS[name, "out_sim"], golden.PROBABILITY)
    close(chosen.log_similarity.exp().tolist(), SETTINGS[name]["sims"], golden.PROBABILITY)


@pytest.mark.parametrize("name", CASES)
def test_mixtures(name):
    given = SETTINGS[name]
    assert given["eps"] == REFERENCE_EPS
    base, other = ARRAYS[name, "base_logits"], ARRAYS[name, "cf_logits"]
    similarity = best(scope(name)).log_similarity
    assert aligned(base, other).shape[1] == given["base_len"]
    if given["hard"]:
        mixed = plain = switched(base, other, similarity)
    else:
        mixed = mixture(base, other, similarity, eps=REFERENCE_EPS)
        plain = mixture(base, other, similarity)
    same(mixed, ARRAYS[name, "out_mixture"], LOGS)
    same(plain, ARRAYS[name, "out_mixture_no_eps"], LOGS)
    # The stored log-probabilities stand for the logits as well.
    logs = ARRAYS[name, "base_logprobs"], ARRAYS[name, "cf_logprobs"]
    if not given["hard"]:
        same(mixture(*logs, similarity), ARRAYS[name, "out_mixture_no_eps"], LOGS)
    found, want = quality(mixed, ARRAYS[name, "labels"]), given["reference_metrics_of_mixture"]
    close(found.accuracy, want["acc"], SHARE)
    close(found.nll, want["nll"], LOGS)
    close(found.probability, want["prob"], golden.PROBABILITY)


@pytest.mark.parametrize("given", SETTINGS["scalar_examples"])
def test_one_token(given):
    similarity = log_similarities(
        torch.tensor([[given["distance"]]]).double(), torch.zeros(1, 1).double()
    )
    close(similarity.exp().item(), given["similarity"], golden.PROBABILITY)
    base, other = (
        torch.tensor([[[given[key], 1 - given[key]]]]).double().log()
        for key in ("p_base", "p_counterfactual")
    )
    found = mixture(base, other, similarity[0])[0, 0, 0]
    close(found.item(), given["mixture_logprob"], LOGS)
    found = mixture(base, other, similarity[0], eps=REFERENCE_EPS)[0, 0, 0]
    close(found.item(), given["mixture_logprob_with_eps"], LOGS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mixture_is_a_distribution_and_its_ends_are_the_two_models(dtype):
    torch.manual_seed(0)
    base, other = 20 * torch.randn(5, 3, 8, dtype=dtype), 20 * torch.randn(5, 4, 8, dtype=dtype)
    similarity = torch.tensor([0.0, -1e-6, -0.7, -30, -1e4], dtype=dtype, requires_grad=True)
    mixed = mixture(base, other, similarity)
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(5, 3, dtype=dtype))
    torch.testing.assert_close(mixed[0], other[0, 1:].log_softmax(-1))
    torch.testing.assert_close(mixed[-1], base[-1].log_softmax(-1))
    (gradient,) = torch.autograd.grad(mixed[..., 0].sum(), similarity)
    assert gradient.isfinite().all()


def test_low_precision_is_mixed_in_float32():
    torch.manual_seed(3)
    low = [torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 3, 8).bfloat16()]
    similarity = torch.tensor([-0.5, -3.0]).bfloat16()
    want = mixture(*(x.float() for x in low), similarity.float())
    assert torch.equal(mixture(*low, similarity), want)


@pytest.mark.parametrize("distance", ["square", "euclidean", "cosine"])
@pytest.mark.parametrize("tanh", [False, True])
def test_gradients(distance, tanh):
    torch.manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    questions, cache, base, other = draw(3, 4), draw(5, 4), draw(3, 2, 6), draw(3, 3, 6)
    scale = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def mixed(questions, cache, scale, base, other):
        found = log_similarities(questions, cache, distance, 2, tanh, scale)
        return mixture(base, other, best(found).log_similarity)

    assert torch.autograd.gradcheck(mixed, (questions, cache, scale, base, other))


@pytest.mark.parametrize("distance", ["square", "euclidean", "cosine"])
def test_the_edit_itself_is_wholly_in_scope(distance):
    torch.manual_seed(2)
    cache = torch.randn(200, 33)
    questions = cache.clone().requires_grad_()
    found = best(log_similarities(questions, cache, distance))
    assert torch.equal(found.index, torch.arange(200))
    assert (found.log_similarity <= 0).all()
    torch.testing.assert_close(found.log_similarity, torch.zeros(200), rtol=0, atol=1e-6)
    mixture(torch.randn(200, 1, 4), torch.randn(200, 1, 4), found.log_similarity).sum().backward()
    assert questions.grad is not None
    assert questions.grad.isfinite().all()


def test_a_hard_switch_is_above_one_half():
    base, other = torch.zeros(3, 1, 2), torch.ones(3, 2, 2)
    similarity = torch.tensor([0.49, 0.5, 0.51], dtype=torch.float64).log()
    similarity[1] = math.log(0.5)
    assert switched(base, other, similarity)[:, 0, 0].tolist() == [0, 0, 1]


def test_texts():
    assert edit_text("What is it?", "a heron") == "What is it? a heron"
    assert counterfactual_context("What is it?", "a heron") == "What is it? a heron "
    assert question_text("And this?", "an otter") == "And this?"
    assert question_text("And this?", "an otter", "reference") == "And this? an otter"


def test_refusals():
    with pytest.raises(ValueError, match="multiple of 2 heads"):
        log_similarities(torch.zeros(1, 5), torch.zeros(1, 5), heads=2)
    with pytest.raises(ValueError, match="at least one cached edit"):
        log_similarities(torch.zeros(1, 4), torch.zeros(0, 4))
    with pytest.raises(ValueError, match="at least the base model's 3 positions; got 2"):
        mixture(torch.zeros(1, 3, 4), torch.zeros(1, 2, 4), torch.zeros(1))
