"""Losses of texts over two processes, and runs that are killed and resumed."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.tasks.group import run_module
from tests.tasks.text_process import SHARES, batch_of, make


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder in which the processes left their results, and how each of them ended."""
    folder = tmp_path_factory.mktemp("text")
    errors = run_module("tests.tasks.text_process", folder)
    return folder, json.loads((folder / "status.json").read_text()), errors


@pytest.mark.parametrize("kind", SHARES)
def test_two_processes_have_the_gradient_of_one(finished, kind, tmp_path):
    folder, status, errors = finished
    assert status["share"] == [0, 0], errors
    task, model = make(kind, tmp_path)
    loss, _ = task.loss(model, batch_of(task, kind, 0, sum(SHARES[kind])))
    loss.backward()
    one, two = (torch.load(folder / f"{kind}-{rank}.pt", weights_only=True) for rank in range(2))
    torch.testing.assert_close((one["loss"] + two["loss"]) / 2, loss.detach(), rtol=1e-5, atol=1e-6)
    largest = 0.0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(one[name], two[name])
            torch.testing.assert_close(one[name], parameter.grad, rtol=2e-4, atol=2e-5)
            largest = max(largest, float(parameter.grad.abs().max()))
    assert largest > 0.1


@pytest.mark.parametrize("kind", SHARES)
def test_a_run_that_is_killed_and_resumed_ends_like_one_that_is_not(finished, kind):
    folder, status, errors = finished
    assert status[kind] == [0, -signal.SIGKILL, 0], errors
    runs = [folder / f"{kind}-{name}" for name in ("whole", "cut")]
    one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines = [(run / "run" / "metrics.jsonl").read_text() for run in runs]
    assert lines[0].count("\n") == lines[1].count("\n") == 8
