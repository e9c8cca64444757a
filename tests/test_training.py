"""Training: resume after a kill, data order, accumulation, atomic checkpoints, clear errors."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from mmtune.batches import EpochBatches
from mmtune.checkpoints import TrainingError, checkpoints, load_weights
from mmtune.config import TrainingOptions
from mmtune.conformance.backbones import build
from mmtune.device import checkpoint_activations
from mmtune.training import train
from mmtune.tuners.presets import lora_config
from tests.fake_task import FakeTask, make_model

SCRIPT = Path(__file__).with_name("fake_task.py")
OPTIONS = TrainingOptions(epochs=2, batch_size=4, lr=1e-2, log_every=1, save_every=0, device="cpu")


def options(**changes):
    return dataclasses.replace(OPTIONS, **changes)


def run_script(*arguments, launcher=()):
    command = [sys.executable, *launcher, str(SCRIPT), *(str(a) for a in arguments)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(SCRIPT.parent.parent),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def run_resumable(*arguments):
    return run_script("resumable", *arguments)


@pytest.mark.parametrize(
    ("evaluate", "method"), [("none", "lora"), ("epoch", "lora"), ("epoch", "adalora")]
)
def test_run_killed_at_a_random_step_and_resumed_ends_bit_identical(tmp_path, evaluate, method):
    whole = run_resumable(tmp_path / "whole", 0, evaluate, method)
    assert whole.returncode == 0, whole.stderr
    kill = random.Random().randint(2, 22)  # of 24 micro-steps
    killed = run_resumable(tmp_path / "cut", kill, evaluate, method)
    assert killed.returncode == -signal.SIGKILL, f"kill {kill}: {killed.stderr}"
    assert not (tmp_path / "cut" / "adapter").exists()
    resumed = run_resumable(tmp_path / "cut", 0, evaluate, method, "--resume")
    assert resumed.returncode == 0, f"kill {kill}: {resumed.stderr}"
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl"):
        same = (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert same, f"{name} differs after a kill in micro-step {kill}"


def test_two_processes_train_like_one_with_the_batch_of_both(tmp_path):
    from safetensors.torch import load_file

    one = run_script("divided", tmp_path / "one", 8)
    assert one.returncode == 0, one.stderr
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    two = run_script("divided", tmp_path / "two", 4, launcher=torchrun)
    assert two.returncode == 0, two.stderr
    lines = [(tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("one", "two")]
    assert len(lines[0]) == len(lines[1]) == 6  # one process writes, not both
    for line, other in zip(*lines, strict=True):
        loss, also = json.loads(line)["loss"], json.loads(other)["loss"]
        assert loss == pytest.approx(also, rel=1e-5)
    weights = [
        load_file(tmp_path / n / "adapter/adapter_model.safetensors") for n in ("one", "two")
    ]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)
    assert [p.name for p in (tmp_path / "two" / "checkpoints").iterdir()] == ["checkpoint-6"]


def test_half_written_checkpoint_is_ignored(tmp_path, monkeypatch):
    trained = options(save_every=2, checkpoints=3)
    model = make_model()

    class Killed(Exception):
        pass

    from mmtune.training import TaskTrainer

    save_rng = TaskTrainer._save_rng_state

    def die_in_second(self, folder):
        if self.state.global_step == 4:
            raise Killed
        save_rng(self, folder)

    monkeypatch.setattr(TaskTrainer, "_save_rng_state", die_in_second)
    with pytest.raises(Killed):
        train(model, FakeTask(), trained, tmp_path, progress=False)
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == ["checkpoint-2"]
    monkeypatch.undo()
    result = train(make_model(), FakeTask(), trained, tmp_path, resume=True, progress=False)
    assert result.steps == 10
    assert not list((tmp_path / "checkpoints").glob(".partial-*"))
    steps = [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 11))


def test_checkpoint_without_its_state_is_ignored(tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-seven").mkdir()
    assert checkpoints(tmp_path) == []


def test_checkpoint_holds_no_base_weight_and_no_pickled_arguments(tmp_path):
    from safetensors.torch import load_file

    train(make_model(), FakeTask(), options(save_every=4), tmp_path, progress=False)
    (folder,) = checkpoints(tmp_path / "checkpoints")
    assert folder.name == "checkpoint-10"
    assert all("lora" in key for key in load_file(folder / "adapter_model.safetensors"))
    assert not (folder / "training_args.bin").exists()


def test_resume_of_a_finished_run_trains_no_further(tmp_path):
    model = make_model()
    train(model, FakeTask(), options(save_every=4), tmp_path, progress=False)
    again = make_model()
    task = FakeTask()
    result = train(again, task, options(save_every=4), tmp_path, resume=True, progress=False)
    assert (result.steps, task.losses) == (10, 0)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_resume_skips_ahead_without_reading_and_sets_the_epoch_first(tmp_path):
    mid = tmp_path / "mid"
    with pytest.raises(TrainingError):
        train(make_model(), DiesInStep(8), options(save_every=3), mid, progress=False)
    task = FakeTask()
    train(make_model(), task, options(save_every=3), mid, resume=True, progress=False)
    assert task.epochs == [1]
    assert len(task.train_dataset.read) == 4 * 4  # steps 7..10, the 6th is in the checkpoint
    assert {epoch for epoch, _ in task.train_dataset.read} == {1}


class DiesInStep(FakeTask):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def loss(self, model, batch):
        loss, numbers = super().loss(model, batch)
        return (loss * float("nan") if self.losses == self.step else loss), numbers


def test_loss_that_is_not_finite_names_step_and_learning_rate(tmp_path):
    with pytest.raises(TrainingError, match=r"nan in step 3.*training\.lr \(now 0\.01\)"):
        train(make_model(), DiesInStep(3), OPTIONS, tmp_path, progress=False)


def test_model_without_trainable_parameters_is_refused(tmp_path):
    model = make_model().requires_grad_(False)
    with pytest.raises(TrainingError, match="no trainable parameter"):
        train(model, FakeTask(), OPTIONS, tmp_path, progress=False)


def test_data_smaller_than_a_batch_is_refused(tmp_path):
    with pytest.raises(TrainingError, match=r"3 samples.*training\.batch_size"):
        train(make_model(), FakeTask(count=3), OPTIONS, tmp_path, progress=False)


def test_missing_tracker_is_named(tmp_path):
    pytest.importorskip("transformers")
    from importlib.util import find_spec

    if find_spec("trackio"):
        pytest.skip("trackio is installed")
    with pytest.raises(TrainingError, match="pip install trackio"):
        train(make_model(), FakeTask(), options(report_to="trackio"), tmp_path, progress=False)


def test_accumulation_gives_the_mean_of_the_micro_batch_gradients(tmp_path):
    """One plain-gradient step of 2 x 4 equals the mean of two gradients worked out by hand."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6))
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    task = FakeTask(count=8)
    task.set_epoch(0)
    expected = [torch.zeros_like(p) for p in parameters]
    for indices in EpochBatches(8, 4, 0, 0, 1, True):
        batch = task.collate([task.train_dataset[i] for i in indices])
        loss, _ = task.loss(model, batch)
        for total, gradient in zip(expected, torch.autograd.grad(loss, parameters), strict=True):
            total += gradient / 2
    seen = []
    from mmtune.training import TaskTrainer

    class Watching(TaskTrainer):
        def _clip_grad_norm(self, model):
            seen.extend(p.grad.clone() for p in parameters)
            return super()._clip_grad_norm(model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmtune.training.TaskTrainer", Watching)
        train(model, task, options(epochs=1, accumulation=2), tmp_path, progress=False)
    for got, want in zip(seen, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    assert all(not torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


@pytest.mark.parametrize(("count", "drop_last"), [(23, True), (23, False), (24, False), (9, False)])
def test_two_processes_see_together_what_one_sees(count, drop_last):
    one = EpochBatches(count, 8, 4, 0, 1, drop_last)
    halves = [EpochBatches(count, 4, 4, rank, 2, drop_last) for rank in (0, 1)]
    for epoch in (0, 3):
        for batches in (one, *halves):
            batches.set_epoch(epoch)
        assert len(one) == len(halves[0]) == len(halves[1]) == len(list(one))
        for together, left, right in zip(one, *halves, strict=True):
            assert len(left) == len(right)
            assert set(together) <= {*left, *right}
            assert len({*left, *right} - set(together)) <= 1  # the sample that fills an odd batch


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        batches = EpochBatches(50, 5, seed, 0, 1, True)
        batches.set_epoch(epoch)
        return [i for batch in batches for i in batch]

    assert order(1, 2) == order(1, 2)
    assert sorted(order(1, 2)) == list(range(50))
    assert len({tuple(order(s, e)) for s in range(3) for e in range(3)}) == 9


def test_bf16_leaves_the_forward_pass_and_the_base_as_they_were(tmp_path):
    model = make_model()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    train(model, FakeTask(), options(precision="bf16"), tmp_path, progress=False)
    model.eval()
    assert model(torch.randn(2, 6)).dtype == torch.float32
    x = torch.randn(8, 6)
    with torch.no_grad():
        layer = model.base_model.model[0]
        want = layer.base_layer(x) + layer.scaling["default"] * layer.lora_B["default"](
            layer.lora_A["default"](x)
        )
        torch.testing.assert_close(layer(x), want, rtol=1e-6, atol=1e-6)
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


def test_best_weights_are_kept_where_asked(tmp_path):
    """A rate so high that later epochs are worse: the run ends with the best epoch's weights."""
    chosen = options(
        epochs=5, lr=0.5, schedule="constant", evaluate="epoch", keep="best", save_every=500
    )
    model, task = make_model(), FakeTask()
    result = train(model, task, chosen, tmp_path, progress=False)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = {x["step"]: x["eval_minus_error"] for x in lines if "eval_minus_error" in x}
    assert len(scores) == 5
    assert result.best_step == max(scores, key=scores.__getitem__)
    assert task.evaluate(model).metrics["minus_error"].value == max(scores.values())


def test_trained_base_parameters_are_in_the_checkpoint_too(tmp_path):
    """A temperature that is trained is no part of an adapter, but a resume must have it."""

    def model_with_trained_bias():
        model = make_model()
        model.base_model.model[3].base_layer.bias.requires_grad_(True)
        return model

    chosen = options(save_every=5)
    trained, again = model_with_trained_bias(), model_with_trained_bias()
    train(trained, FakeTask(), chosen, tmp_path, progress=False)
    train(again, FakeTask(), chosen, tmp_path, resume=True, progress=False)
    for (name, one), other in zip(trained.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
    (folder,) = checkpoints(tmp_path / "checkpoints")
    with pytest.raises(TrainingError, match=r"bias: model none, file \(6,\)"):
        load_weights(make_model(), folder)


def test_weights_of_another_rank_are_refused(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    base = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 6))
    other = get_peft_model(base, LoraConfig(target_modules=["0", "3"], r=2))
    with pytest.raises(TrainingError, match=r"model \(2, 6\), file \(4, 6\)"):
        load_weights(other, tmp_path)


def test_gradient_checkpointing_of_a_model_without_it_is_refused():
    model = build("open_clip-fused")
    wrapped = get_peft_model(model, lora_config(model))
    with pytest.raises(TrainingError, match="CLIP cannot checkpoint activations"):
        checkpoint_activations(wrapped)
