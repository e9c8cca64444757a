"""What memories route by: the question's words and the image, never an answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from editing.features import features_of
from tests.editing.tiny import (
    BARE,
    CAPTION,
    MODELS,
    NEWER,
    OTHER,
    REQUEST,
    SEEN,
    bits,
    same_bits,
    tiny,
)

EVERY = pytest.mark.parametrize("name", [*MODELS, "qwen2", *NEWER])


@EVERY
def test_one_by_one_equals_a_batch_and_leaves_the_model_alone(name):
    mllm = tiny(name)
    before = bits(mllm.model)
    asked = [SEEN, BARE, OTHER, CAPTION, REQUEST]
    together, alone = features_of(mllm, asked), [features_of(mllm, [one]) for one in asked]
    for i, one in enumerate(alone):
        torch.testing.assert_close(together.words[i], one.words[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together.image[i], one.image[0], rtol=1e-5, atol=1e-5)
    assert together.seen.tolist() == [True, False, True, True, True]
    assert together.image[1].abs().max() == 0
    assert together.words[3].abs().max() == 0
    assert same_bits(mllm.model, before)
    in_pieces = features_of(mllm, asked, size=2)
    torch.testing.assert_close(in_pieces.words, together.words, rtol=1e-5, atol=1e-5)


@EVERY
def test_words_and_image_are_told_apart(name):
    mllm = tiny(name)
    asked = [SEEN, replace(SEEN, image=OTHER.image), replace(SEEN, question=OTHER.question)]
    found = features_of(mllm, asked)
    assert torch.equal(found.words[0], found.words[1])
    assert not torch.allclose(found.words[0], found.words[2])
    assert torch.equal(found.image[0], found.image[2])
    assert not torch.allclose(found.image[0], found.image[1])


@EVERY
def test_the_answer_is_not_read(name):
    mllm = tiny(name)
    one, other = features_of(mllm, [SEEN]), features_of(mllm, [replace(SEEN, answer="w30")])
    assert torch.equal(one.words, other.words)
    assert torch.equal(one.image, other.image)


def test_features_do_not_follow_one_long_state():
    """As in trained models: a state of one token is a thousand times as long as the others.

    The cosine of the means of these states as they are is above 0.9999.
    """
    mllm = tiny("llava")
    asked = [SEEN, BARE]
    before = features_of(mllm, asked)
    with torch.no_grad():  # the token that begins every prompt
        mllm.model.get_input_embeddings().weight[1].mul_(1e5)
    found = features_of(mllm, asked)
    assert float(torch.nn.functional.cosine_similarity(*found.words, dim=0)) < 0.9
    assert torch.equal(found.image, before.image)


def test_features_are_means_of_states_of_mean_0_and_variance_1():
    """Written out, of the image's tokens as the language model is given them."""
    mllm = tiny("llava")
    (tokens,) = mllm.backbone.image_tokens(mllm.model, **mllm.pixels([SEEN.image]))
    exact = tokens.double()
    apart = exact - exact.mean(1, keepdim=True)
    want = (apart / (apart.square().mean(1, keepdim=True) + 1e-5).sqrt()).mean(0)
    found = features_of(mllm, [SEEN])
    torch.testing.assert_close(found.image[0].double(), want, rtol=1e-4, atol=1e-5)
    assert abs(float(found.words[0].mean())) < 1e-5
