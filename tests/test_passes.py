"""Passes where nothing can be recorded: those of the plain Trainer, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
import torch
from torch import nn

from mmtune.config import TrainingOptions
from mmtune.passes import Passes
from mmtune.training import train
from tests.fake_task import FakeTask, make_model

OPTIONS = TrainingOptions(
    epochs=2, batch_size=4, lr=1e-2, log_every=1, save_every=0, device="cpu", drop_last=False
)


def trained(folder, task=None, **changes):
    model = make_model()
    options = dataclasses.replace(OPTIONS, **changes)
    train(model, task or FakeTask(), options, folder, seed=1, progress=False)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [p for p in model.parameters() if p.requires_grad], lines


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_run_on_the_cpu_is_the_plain_one(tmp_path, accumulation, caplog):
    plain, lines = trained(tmp_path / "plain", accumulation=accumulation)
    with caplog.at_level(logging.INFO):
        found, same = trained(tmp_path / "found", accumulation=accumulation, cuda_graphs=True)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert same == lines
    assert "training.cuda_graphs has no effect on the CPU" in caplog.text


def test_numbers_of_a_pass_and_the_gradients_of_two():
    weight = nn.Parameter(torch.tensor([2.0]))

    def forward(batch, factor):
        loss = factor * (weight * batch["x"]).sum()
        return loss, {"seen": batch["x"].sum(), "factor": float(factor)}

    passes = Passes(forward, torch.Tensor.backward, [weight], torch.device("cpu"), True)
    for _ in range(3):
        weight.grad = None
        loss, numbers = passes({"x": torch.tensor([1.0, 3.0])}, 5)
        assert numbers == {"loss": 40.0, "seen": 4.0, "factor": 5.0}
        assert loss.item() == 40.0
        assert not loss.requires_grad
        passes({"x": torch.tensor([1.0])}, 2)
        assert weight.grad.item() == 22.0
    assert passes.replayed == 0


def test_an_error_in_a_pass_comes_out():
    def broken(batch):
        raise RuntimeError("out of luck")

    passes = Passes(broken, torch.Tensor.backward, [], torch.device("cpu"))
    with pytest.raises(RuntimeError, match="out of luck"):
        passes({})
