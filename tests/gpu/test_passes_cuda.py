"""Passes that are recorded and replayed: the bits of plain ones, whatever trains."""

import dataclasses
import json
import logging

import pytest
import torch
from torch import nn

from mmtune import training
from mmtune.backbones import backbone_of
from mmtune.conformance.backbones import BACKBONES, build
from mmtune.conformance.methods import METHODS, PAIRS
from mmtune.passes import SHAPES, Passes
from mmtune.tuners import registry
from tests.fake_task import FakeTask, make_model
from tests.test_passes import OPTIONS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)
ROWS = [
    (m, b) for m, b in PAIRS
    if m == METHODS[m].method and b in ("clip", "blip-retrieval", "llava")
]  # fmt: skip


@pytest.fixture
def made(monkeypatch):
    """All `Passes` that the Trainer makes."""
    found = []

    class Watched(Passes):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            found.append(self)

    monkeypatch.setattr(training, "Passes", Watched)
    return found


def trained(folder, task=None, resume=False, **changes):
    model = make_model()
    options = dataclasses.replace(OPTIONS, **{"device": "cuda", "epochs": 6, **changes})
    training.train(
        model, task or FakeTask(), options, folder, seed=1, resume=resume, progress=False
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [p for p in model.parameters() if p.requires_grad], lines


def same(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_replayed_run_with_dropout_is_the_plain_one(tmp_path, made, accumulation, precision):
    changes = {"accumulation": accumulation, "precision": precision}
    plain, lines = trained(tmp_path / "plain", **changes)
    found, noted = trained(tmp_path / "found", cuda_graphs=True, **changes)
    assert made[0].replayed > 15  # of 36 passes, in two shapes of batch
    assert same(found, plain)
    assert noted == lines


def test_a_resumed_run_is_the_whole_one(tmp_path, made):
    whole, _ = trained(tmp_path / "whole", cuda_graphs=True, save_every=5)
    changes = {"cuda_graphs": True, "save_every": 5}
    with pytest.raises(Stop):
        trained(tmp_path / "cut", Stopping(17), **changes)
    found, _ = trained(tmp_path / "cut", resume=True, **changes)
    assert [passes.replayed > 0 for passes in made] == [True] * 3
    assert same(found, whole)


class Stop(Exception):
    pass


class Stopping(FakeTask):
    """Stops the run at a batch; batches are collated whether passes are replayed or not."""

    def __init__(self, batch):
        super().__init__()
        self.left = batch

    def collate(self, samples):
        self.left -= 1
        if self.left == 0:
            raise Stop
        return super().collate(samples)


class Asking(FakeTask):
    """Asks the device whether a number is positive, and does other things if it is not."""

    def __init__(self, threshold):
        super().__init__()
        self.threshold = threshold

    def loss(self, model, batch):
        loss, numbers = super().loss(model, batch)
        if bool(batch["x"].sum() > self.threshold):
            loss = loss * 2
        return loss, numbers


@pytest.mark.parametrize(("threshold", "right"), [(-1e3, True), (0.0, False)])
def test_another_answer_makes_a_pass_plain(tmp_path, made, threshold, right, caplog):
    plain, lines = trained(tmp_path / "plain", Asking(threshold))
    found, noted = trained(tmp_path / "found", Asking(threshold), cuda_graphs=True)
    assert same(found, plain)
    assert noted == lines
    assert (made[0].replayed > 20) == right
    assert ("changes from batch to batch" not in caplog.text) == right


class Sized(FakeTask):
    """Has a tensor whose size only the device knows."""

    def loss(self, model, batch):
        loss, numbers = super().loss(model, batch)
        return loss + 0 * batch["x"][batch["x"] > 0].sum(), numbers


def test_what_cannot_be_recorded_is_plain(tmp_path, made, caplog):
    plain, _ = trained(tmp_path / "plain", Sized())
    found, _ = trained(tmp_path / "found", Sized(), cuda_graphs=True)
    assert same(found, plain)
    assert made[0].replayed == 0
    assert "passes are made plainly from now on" in caplog.text
    torch.randn(3, device="cuda")  # the generator is as usable as before


def test_what_changes_from_step_to_step_is_plain(tmp_path, made, caplog):
    class Changing(FakeTask):
        def hooks(self, model, total_steps):
            hooks = super().hooks(model, total_steps)
            hooks.replayable = False
            return hooks

    with caplog.at_level(logging.INFO):
        trained(tmp_path, Changing(), cuda_graphs=True)
    assert made[0].replayed == 0
    assert "no effect with a task or method that changes from step to step" in caplog.text


def steps(method, backbone, replays, count=6):
    """Losses and parameters of a method's steps in bf16."""
    case = METHODS[method]
    torch.manual_seed(0)
    model = build(backbone).bfloat16().cuda()
    view = backbone_of(model)
    view.prepare()
    case.base(model)
    torch.manual_seed(1)
    wrapped = registry.apply(
        model, case.method, registry.method(case.method).options(**case.settings)
    ).train()
    hooks = registry.hooks_for(wrapped, 100, 0)
    trains = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trains, lr=1e-3, fused=True)

    def forward(batch):
        found = BACKBONES[backbone].outputs(wrapped, view, batch).float()
        loss, penalty = found.square().mean(), hooks.penalty()
        return loss if penalty is None else loss + penalty, {}

    passes = Passes(forward, torch.Tensor.backward, trains, CUDA, replays=replays)
    losses = []
    for step in range(count):
        batch = {k: v.cuda() for k, v in BACKBONES[backbone].batch(step, 3).items()}
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
        _, numbers = passes(batch)
        losses.append(numbers["loss"])
        optimizer.step()
        optimizer.zero_grad()
    return losses, trains, passes.replayed


@pytest.mark.parametrize(("method", "backbone"), ROWS)
def test_every_method_replayed_has_the_bits_of_plain_steps(method, backbone):
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    losses, wanted, _ = steps(method, backbone, False)
    found, trains, replayed = steps(method, backbone, True)
    assert found == losses
    assert same(trains, wanted)
    # BLIP's matching in transformers makes the mask of an image on the host and sends it each time.
    assert replayed == (0 if backbone == "blip-retrieval" else 4)


def test_shapes_beyond_the_first_are_plain():
    weight = nn.Parameter(torch.ones(1, device=CUDA))
    passes = Passes(
        lambda batch: ((weight * batch["x"]).sum(), {}), torch.Tensor.backward, [weight], CUDA
    )
    for _ in range(4):
        for size in range(1, SHAPES + 4):
            weight.grad = None
            passes({"x": torch.ones(size, device=CUDA)})
            assert weight.grad.item() == size
    assert passes.replayed == SHAPES * 2
