"""Steps where nothing can be recorded, and what the host asks for answered from notes."""

from __future__ import annotations

import pytest
import torch

from mmtune.questions import Questions
from mmtune.replayed import Steps

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
