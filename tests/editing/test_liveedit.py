"""LiveEdit-style experts: routing by hand-made features, what is added, many of them."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from editing.features import Features
from editing.methods.liveedit import Experts, Fact, LiveEdit, Router
from editing.methods.memory import Memory
from editing.requests import EditRequest, Probe
from tests.editing.memories import fact, memory_editor, request, taught
from tests.editing.tiny import PROBES, drawn, tiny

ROUTER = Router(image_above=0.9, words_above=0.5, alone_above=0.9, temperature=0.1, experts=2)


def features(words, images):
    image = torch.tensor([i or [0.0, 0.0] for i in images])
    return Features(torch.tensor(words), image, torch.tensor([i is not None for i in images]))


STORED = features(
    [[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [1.0, 0.0]],
    [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], None],
)


def mixed(words, image):
    index, weights = ROUTER.mixture(features([words], [image]), STORED)
    return {int(i): float(w) for i, w in zip(index[0], weights[0], strict=True) if w}


def test_images_filter_and_words_mix():
    # Words alike to 1 and to 0.8, apart by 0.2 / 0.1; number 3, without an image, fits as well.
    index, _ = ROUTER.mixture(features([[1.0, 0.0]], [[1.0, 0.0]]), STORED)
    assert set(index[0].tolist()) == {0, 3}
    assert mixed([0.0, 1.0], [1.0, 0.0]) == {1: 1.0}
    assert mixed([0.0, 1.0], [0.0, 1.0]) == {2: 1.0}
    assert mixed([1.0, 0.0], None) == {3: 1.0}
    assert mixed([0.0, 1.0], None) == {}
    assert mixed([0.8, 0.6], None) == {}  # alike to 0.8, which is not enough for words alone
    assert mixed([-1.0, 0.0], [1.0, 0.0]) == {}
    two = features([[1.0, 0.0], [0.8, 0.6]], [[1.0, 0.0], [1.0, 0.0]])
    _, weights = ROUTER.mixture(features([[1.0, 0.0]], [[1.0, 0.0]]), two)
    want = torch.tensor([10.0, 8.0]).softmax(0)
    torch.testing.assert_close(weights[0], want)


def test_the_nearest_image_comes_before_others_that_are_near_enough():
    near = features([[1.0, 0.0], [0.8, 0.6]], [[0.95, 0.31], [1.0, 0.0]])
    asked = features([[1.0, 0.0]], [[1.0, 0.0]])
    router = replace(ROUTER, image_margin=0.01)
    index, weights = router.mixture(asked, near)
    assert {int(i): float(w) for i, w in zip(index[0], weights[0], strict=True) if w} == {1: 1.0}
    _, weights = replace(router, image_margin=0.1).mixture(asked, near)
    torch.testing.assert_close(weights[0], torch.tensor([10.0, 8.0]).softmax(0))
    # An image that is nearer and asked about otherwise does not count.
    apart = features([[1.0, 0.0], [0.0, 1.0]], [[0.95, 0.31], [1.0, 0.0]])
    index, weights = router.mixture(asked, apart)
    assert (int(index[0, 0]), weights[0].tolist()) == (0, [1.0, 0.0])


def test_captions_are_alike():
    stored = features([[0.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]])
    index, weights = ROUTER.mixture(features([[0.0, 0.0]], [[1.0, 0.0]]), stored)
    assert int(index[0, 0]) == 0
    assert weights[0].tolist() == [1.0, 0.0]


def test_what_experts_add():
    experts, h = Experts(drawn((3, 2, 8), 0), drawn((3, 2, 8), 1)), drawn((2, 4, 8), 2)
    index, weights = torch.tensor([[0, 2], [1, 0]]), torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    found = experts.added(h, index, weights)
    x = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    for row in range(2):
        want = sum(
            w * (x[row] @ experts.up[i].T).relu() @ experts.down[i]
            for i, w in zip(index[row], weights[row], strict=True)
        )
        torch.testing.assert_close(found[row], want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_questions_about_other_images_keep_every_bit():
    mllm, asked = tiny("llava"), fact()
    elsewhere = [
        Probe(asked.question, "w5", request(30).image),
        Probe(asked.question, "w5"),
        Probe("w50 w51", "w5", request(31).image),
    ]
    base = mllm.answer_logits(mllm.batch(elsewhere))
    with taught("liveedit").applied(mllm):
        assert torch.equal(mllm.answer_logits(mllm.batch(elsewhere)), base)
        assert mllm.answer([asked]) == [asked.target]


@torch.no_grad()
def test_the_latest_of_two_edits_of_one_question_replaces_the_other():
    mllm, live, first = tiny("llava"), memory_editor("liveedit"), fact()
    changed = EditRequest(first.question, "w26", first.image)
    edits = (live.extend(mllm, taught("liveedit"), [changed]), live.edit(mllm, [first, changed]))
    for edit in edits:
        assert edit.about["experts"] == 1
        with edit.applied(mllm):
            assert mllm.answer([first]) == ["w26"]


def test_experts_do_not_depend_on_what_is_fitted_with_them():
    mllm, live = tiny("llava"), memory_editor("liveedit", steps=4)
    facts = [fact(), request(26), request(44, image=False)]
    together = live.edit(mllm, facts).experts
    for row, one in enumerate(facts):
        alone = live.edit(mllm, [one]).experts
        torch.testing.assert_close(together.down[row], alone.down[0], rtol=1e-2, atol=1e-3)


@torch.no_grad()
def test_a_thousand_experts(tmp_path):
    mllm, edit = tiny("llava"), taught("liveedit")
    n, (_, rank, width) = 1000, edit.experts.up.shape
    seen = torch.arange(n) % 10 > 0
    image = drawn((n, width), 2) * seen[:, None]
    memory = Memory(
        tuple(Fact(f"other {i}") for i in range(n)), Features(drawn((n, width), 1), image, seen)
    )
    crowd = Experts(drawn((n, rank, width), 3), drawn((n, rank, width), 4))
    many = LiveEdit(edit.path, crowd, memory, edit.router, edit.made_on).then(edit)
    assert isinstance(many, LiveEdit)
    many.save(tmp_path / "edit")
    base = mllm.answer_logits(mllm.batch(PROBES))
    with many.applied(mllm):
        start = time.perf_counter()
        assert torch.equal(mllm.answer_logits(mllm.batch(PROBES)), base)
        assert time.perf_counter() - start < 5
        assert mllm.answer([fact()]) == [fact().target]
    size = (tmp_path / "edit" / "edit.safetensors").stat().st_size
    assert size == pytest.approx(4 * 1001 * width * (2 * rank + 2), rel=0.02)
