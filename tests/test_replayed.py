"""Steps where nothing can be recorded, and what the host asks for answered from notes."""

from __future__ import annotations

import math

import pytest
import torch

from mmtune.constants import constant, is_constant
from mmtune.questions import Questions
from mmtune.replayed import Steps, constants_kept

CPU = torch.device("cpu")


def test_steps_on_a_cpu_are_plain():
    """Gradient descent on (w - 3)^2 by hand: w <- w - 0.25 * 2 (w - 3)."""
    weight = torch.tensor([1.0], requires_grad=True)
    optimiser = torch.optim.SGD([weight], lr=0.25)
    runs = []

    def gradients():
        optimiser.zero_grad()
        loss = (weight - 3).square()
        loss.sum().backward()
        runs.append(loss.item())
        return loss.detach()

    with Steps(gradients, optimiser.step, CPU) as steps:
        found = []
        for _ in range(5):
            found += steps.gradients()
            steps.update()
        assert not steps.replays
    assert found == runs == [4.0, 1.0, 0.25, 0.0625, 0.015625]
    assert weight.item() == 3 - 2 / 2**5


def test_an_error_in_a_step_comes_out():
    def broken():
        raise RuntimeError("out of luck")

    with Steps(broken, broken, CPU) as steps, pytest.raises(RuntimeError, match="out of luck"):
        steps.gradients()


def asks(numbers, mask):
    """Three questions, of three kinds; the device's own view of them is in `numbers`."""
    found = numbers * int(mask.sum())
    if bool(mask.all()):
        found = found + 1
    return found + float(mask.double().mean())


def test_questions_are_noted_and_answered_as_noted():
    numbers, mask = torch.ones(2), torch.tensor([1, 1, 0, 1])
    with Questions(CPU) as asked:
        wanted = asks(numbers, mask)
    assert asked.answers == [3, False, 0.75]
    assert asked.right().tolist() == [True]
    with Questions(CPU, asked.answers) as again:
        assert torch.equal(asks(numbers, mask), wanted)
    assert again.right().tolist() == [True]


@pytest.mark.parametrize("mask", [[1, 1, 1, 1], [1, 0, 0, 1]])
def test_another_answer_is_noticed(mask):
    with Questions(CPU) as asked:
        asks(torch.ones(2), torch.tensor([1, 1, 0, 1]))
    with Questions(CPU, asked.answers) as again:
        found = asks(torch.ones(2), torch.tensor(mask))
    assert found.tolist() == [3.75, 3.75]  # as it was noted
    assert again.right().tolist() == [False]


def test_more_or_fewer_questions_are_an_error():
    mask = torch.tensor([1, 0])
    with pytest.raises(RuntimeError, match="asks the device for more"), Questions(CPU, [1]):
        asks(torch.ones(2), mask)
    with Questions(CPU, [1, False, 0.5, 7]) as asked:
        asks(torch.ones(2), mask)
    with pytest.raises(RuntimeError, match="asks the device for less"):
        asked.right()


@pytest.mark.parametrize("size", [(4, 3), (3, 3), (12,)])
@pytest.mark.parametrize("rows", [[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]])
def test_what_was_put_at_a_mask_gets_its_gradient_without_a_question(rows, size):
    mask = torch.tensor(rows, dtype=torch.bool)[:, None].expand(4, 3)
    if math.prod(size) < int(mask.sum()):
        return

    def gradient():
        source = torch.arange(math.prod(size), dtype=torch.float32).view(size).requires_grad_()
        y = torch.zeros(4, 3).masked_scatter(mask, source)
        (y * torch.linspace(-1, 2, 12).view(4, 3)).sum().backward()
        return source.grad

    wanted = gradient()
    with Questions(CPU) as asked:
        assert torch.equal(gradient(), wanted)
    assert asked.answers == []


@pytest.mark.parametrize("numbers", [3, -0.0, [1, 2], (True, False), [], 2.5])
def test_constants_are_what_torch_makes_of_them(numbers):
    assert is_constant(numbers)
    found, wanted = constant(numbers, CPU), torch.tensor(numbers)
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)
    assert str(constant(numbers, "cpu", torch.float64)) == str(
        torch.tensor(numbers, dtype=torch.float64)
    )


@pytest.mark.parametrize("numbers", [[[1]], torch.ones(1), [torch.ones(())], "a", None, 1j])
def test_other_things_are_no_constants(numbers):
    assert not is_constant(numbers)


def test_torch_makes_tensors_as_before_while_constants_are_kept():
    stock = torch.tensor
    with constants_kept():
        assert torch.equal(torch.tensor([1.5]), stock([1.5]))
        assert torch.tensor(2, device="cpu").device == CPU
    assert torch.tensor is stock
