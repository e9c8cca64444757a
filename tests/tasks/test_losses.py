from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from mmtune.tasks.losses import clip_loss, sigmoid_loss
from tests.tasks.group import run_module
from tests.tasks.two_towers import CASES, TwoTowers, case_loss, whole


def features(count=6, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(count, width, generator=generator), dim=1) for _ in range(2)]


def test_clip_loss_equals_two_cross_entropies():
    image, text = features()
    logits = 7.0 * image @ text.T
    labels = torch.arange(6)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    found = clip_loss(image, text, torch.tensor(7.0))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    distinct = torch.stack([labels, labels], 1)
    assert torch.equal(found, clip_loss(image, text, torch.tensor(7.0), distinct))


def test_equal_features_give_closed_forms():
    ones = torch.ones(8, 1)
    assert clip_loss(ones, ones, torch.tensor(3.0)).item() == pytest.approx(math.log(8))
    found = sigmoid_loss(ones, ones, torch.tensor(3.0), torch.tensor(-1.0)).item()
    own, other = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert found == pytest.approx(own + 7 * other, rel=1e-6)


def test_sigmoid_loss_equals_the_double_sum():
    image, text = features()
    scale, bias = torch.tensor(9.0), torch.tensor(-4.0)
    total = 0.0
    for i in range(6):
        for j in range(6):
            z = 1 if i == j else -1
            total -= F.logsigmoid(z * (scale * image[i] @ text[j] + bias)).item()
    assert sigmoid_loss(image, text, scale, bias).item() == pytest.approx(total / 6, rel=1e-6)


def test_groups_add_positives():
    image, text = features(4)
    groups = torch.tensor([[0, 0], [1, 0], [2, 2], [2, 3]])  # 0, 1 share a text; 2, 3 an image
    partner = [1, 0, 3, 2]
    logits = 5.0 * image @ text.T
    expected = 0.0
    for scores in (logits, logits.T):
        logs = scores.log_softmax(1)
        expected -= sum(float(logs[i, i] + logs[i, partner[i]]) / 2 for i in range(4)) / 8
    found = clip_loss(image, text, torch.tensor(5.0), groups).item()
    assert found == pytest.approx(expected, rel=1e-6)
    signs = torch.full((4, 4), -1.0)
    for i in range(4):
        signs[i, i] = signs[i, partner[i]] = 1
    by_hand = -F.logsigmoid(signs * (logits - 1)).sum() / 4
    found = sigmoid_loss(image, text, torch.tensor(5.0), torch.tensor(-1.0), groups)
    torch.testing.assert_close(found, by_hand, rtol=1e-6, atol=0)


def test_autocast_does_not_round_the_logits():
    image, text = features(32, 16)
    scale, bias = torch.tensor(100.0), torch.tensor(-10.0)
    plain = clip_loss(image, text, scale), sigmoid_loss(image, text, scale, bias)
    with torch.autocast("cpu", torch.bfloat16):
        cast = clip_loss(image, text, scale), sigmoid_loss(image, text, scale, bias)
    assert [p.item() for p in plain] == [c.item() for c in cast]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two gloo processes computed, by case."""
    folder = tmp_path_factory.mktemp("gather")
    run_module("tests.tasks.gather_process", folder)
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
        for name in CASES
    }


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_gradient_of_one(two_processes, name):
    model = TwoTowers()
    loss = case_loss(model, whole(name), name)
    loss.backward()
    one, two = two_processes[name]
    torch.testing.assert_close((one["loss"] + two["loss"]) / 2, loss.detach(), rtol=1e-6, atol=1e-6)
    for parameter, value in model.named_parameters():
        assert torch.equal(one[parameter], two[parameter])
        torch.testing.assert_close(one[parameter], value.grad, rtol=1e-5, atol=1e-6)
        assert parameter == "bias" or value.grad.abs().max() > 1e-3
