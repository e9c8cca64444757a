"""MEND's rows of real layers: their sum is the weight gradient, on every family of MLLMs."""

from __future__ import annotations

import pytest
import torch

from editing.methods.mend_transform import captured, nonzero_rows
from editing.metrics.answers import AnswerTokens, answer_nll
from tests.backbones.writers import writer

QUESTIONS, TARGETS = ["w5 w9 w7", "w6"], ["w20 w21", "w22 w23 w24"]


def nll(model, view, batch):
    logits = view.target_logits(model, batch)
    return answer_nll(AnswerTokens.of_targets(logits, batch["target_ids"], batch["target_mask"]))


@pytest.mark.parametrize("branch", ["language", "vision"])
@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "llava"])
def test_rows_of_frozen_layers_sum_to_the_weight_gradient(name, branch):
    model, view, tokenizer = writer(name)
    model.eval().requires_grad_(True)
    prompts = [f"<image> {q}" if name == "llava" else q for q in QUESTIONS]
    batch = {
        "pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)),
        **view.prompts(tokenizer, prompts),
        **view.targets(tokenizer, TARGETS),
        "owner": torch.tensor([0, 1]),
    }
    layers = {s.path: s.module for s in view.select([branch], ["fc1", "fc2"], "last:2")}
    weights = [layer.weight for layer in layers.values()]
    want = torch.autograd.grad(nll(model, view, batch), weights)
    model.requires_grad_(False)
    with captured(layers) as found:
        loss = nll(model, view, batch)
    rows = found.rows(loss)
    for path, gradient in zip(layers, want, strict=True):
        x, delta = nonzero_rows(*rows[path])
        assert gradient.abs().max() > 0
        torch.testing.assert_close(delta.T @ x, gradient, rtol=1e-4, atol=1e-7)
    assert not any(p.requires_grad for p in model.parameters())
