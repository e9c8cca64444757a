"""The losses of video tasks over two processes."""

from __future__ import annotations

import pytest
import torch

from tests.tasks.group import run_module
from tests.tasks.video_process import SHARES, batch_of, make


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder in which two processes left their losses and gradients."""
    folder = tmp_path_factory.mktemp("video")
    run_module("tests.tasks.video_process", folder)
    return folder


@pytest.mark.parametrize("kind", ["video_retrieval", "video_qa"])
def test_two_processes_have_the_gradient_of_one(finished, kind, tmp_path):
    task, model = make(kind, tmp_path)
    loss, _ = task.loss(model, batch_of(task, [i for share in SHARES for i in share]))
    loss.backward()
    alone = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    one, two = (torch.load(finished / f"{kind}-{r}.pt", weights_only=True) for r in range(2))
    assert (one["loss"] + two["loss"]).item() / 2 == pytest.approx(loss.item(), rel=1e-5)
    assert one["gradients"].keys() == two["gradients"].keys() == alone.keys()
    for name, gradient in alone.items():
        assert torch.equal(one["gradients"][name], two["gradients"][name])
        torch.testing.assert_close(one["gradients"][name], gradient, rtol=1e-4, atol=1e-5)
    assert max(float(g.abs().max()) for g in alone.values()) > 0.01
