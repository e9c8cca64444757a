"""AdaLoRA: the budget, the penalty, and what is left when a run ends."""

import json
import math
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mmtune import load_adapter, merge
from mmtune.backbones import backbone_of
from mmtune.config import TrainingOptions
from mmtune.conformance.backbones import BACKBONES, build
from mmtune.tasks.losses import clip_loss
from mmtune.training import train
from mmtune.tuners.adalora import (
    AdaLoraHooks,
    AdaLoraOptions,
    adalora_config,
    regularization_loss,
)
from tests.fake_task import FakeTask, make_model

SETTINGS = {"init_rank": 6, "target_rank": 2, "initial_share": 0.1, "final_share": 0.3}


def adapted(backbone, **settings):
    model = build(backbone)
    torch.manual_seed(0)
    return peft.get_peft_model(model, adalora_config(model, **(SETTINGS | settings)))


def lambdas(model):
    return {n: p for n, p in model.named_parameters() if ".lora_E." in n}


def left(model):
    return sum(int((p != 0).sum()) for p in lambdas(model).values())


def contrastive_steps(model, backbone, steps, after=lambda step: None):
    """Train as a run does, on the contrastive loss; `after` is called after each step."""
    view, hooks = backbone_of(model), AdaLoraHooks(model, steps, seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for step in range(1, steps + 1):
        pairs = view.embed_pairs(model, BACKBONES[backbone].batch(step, 4))
        loss = clip_loss(pairs.image, pairs.text, pairs.scale) + hooks.penalty()
        loss.backward()
        optimizer.step()
        hooks.after_step(step)
        optimizer.zero_grad()
        after(step)
    model.eval()
    return hooks


def outputs(model, backbone):
    case = BACKBONES[backbone]
    with torch.no_grad():
        return case.outputs(model, backbone_of(model), case.batch(0, 3))


@pytest.mark.parametrize("backbone", ["open_clip", "clip"])
def test_what_is_left_after_each_step_is_the_cubic_budget(backbone):
    steps, first, last = 20, 2, 14  # t_i = 0.1 of the steps, T - t_f = 0.7 of them
    model = adapted(backbone)
    weights = len(lambdas(model))
    start, end = 6 * weights, 2 * weights
    found = []
    contrastive_steps(model, backbone, steps, lambda step: found.append(left(model)))
    expected = [
        start
        if t <= first
        else math.floor(end + (start - end) * (1 - (t - first) / (last - first)) ** 3)
        if t < last
        else end
        for t in range(1, steps + 1)
    ]
    assert found == expected


def test_cuts_happen_every_delta_t_steps_and_at_the_last():
    model = adapted("clip", delta_t=5)
    weights = len(lambdas(model))
    found = []
    contrastive_steps(model, "clip", 20, lambda step: found.append(left(model)))
    cut_at_5 = found[4]
    assert found[:4] == [6 * weights] * 4
    assert 2 * weights < cut_at_5 < 6 * weights
    assert found[13:] == [2 * weights] * 7  # the 14th step is no multiple of 5 but ends the phase


@pytest.mark.parametrize("backbone", ["open_clip", "clip"])
def test_finished_adapter_holds_the_budget_and_loads_bit_for_bit(backbone, tmp_path, recwarn):
    model = adapted(backbone)
    hooks = contrastive_steps(model, backbone, 10)
    whole = outputs(model, backbone)
    hooks.finish()
    cut = outputs(model, backbone)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    ranks = {n.rpartition(".")[0]: len(t) for n, t in saved.items() if n.endswith("lora_E")}
    budget = 2 * len(ranks)
    assert sum(int((t != 0).sum()) for n, t in saved.items() if n.endswith("lora_E")) == budget
    assert len(set(ranks.values())) > 1  # ranks have moved
    for prefix, rank in ranks.items():
        assert saved[f"{prefix}.lora_A"].shape[0] == saved[f"{prefix}.lora_B"].shape[1] == rank
    assert torch.equal(outputs(load_adapter(build(backbone), tmp_path), backbone), cut)
    fresh = build(backbone)
    backbone_of(fresh).prepare()
    again = peft.PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
    assert torch.equal(outputs(again, backbone), cut)
    with again.disable_adapter():
        base = build(backbone)
        backbone_of(base).prepare()
        assert torch.equal(outputs(again, backbone), outputs(base, backbone))
    merged = merge(again)
    assert ((outputs(merged, backbone) - cut).abs().max() / cut.abs().max()) < 1e-5
    assert not [w for w in recwarn if "rank_pattern" in str(w.message)]


def test_finishing_keeps_float32_adapters_on_a_bfloat16_base():
    model = build("clip").to(torch.bfloat16)
    wrapped = peft.get_peft_model(model, adalora_config(model, **SETTINGS))
    before = {n: p.detach().clone() for n, p in wrapped.named_parameters() if "lora_A" in n}
    hooks = AdaLoraHooks(wrapped, 10, seed=0)
    hooks.kept = {}
    for p in lambdas(wrapped).values():
        p.data[1::2] = 1.0
    hooks.finish()
    for name, parameter in wrapped.named_parameters():
        if "lora_A" in name:
            assert torch.equal(parameter, before[name][1::2])


def test_weight_without_any_triplet_left_adds_nothing_and_can_be_saved(tmp_path, recwarn):
    model = adapted("clip")
    hooks = contrastive_steps(model, "clip", 10)
    for n, p in lambdas(model).items():
        if ".q_proj." in n:
            p.data.zero_()
    hooks.finish()
    found = outputs(model, "clip")
    model.save_pretrained(tmp_path)
    assert not [w for w in recwarn if "invalid shape" in str(w.message)]
    assert torch.equal(outputs(load_adapter(build("clip"), tmp_path), "clip"), found)


def test_trained_further_it_keeps_its_ranks(tmp_path):
    model = adapted("clip")
    contrastive_steps(model, "clip", 10).finish()
    model.save_pretrained(tmp_path)
    again = load_adapter(build("clip"), tmp_path, trainable=True)
    shapes = {n: p.shape for n, p in lambdas(again).items()}
    before = outputs(again, "clip")
    contrastive_steps(again, "clip", 10).finish()
    assert {n: p.shape for n, p in lambdas(again).items()} == shapes
    assert not torch.equal(outputs(again, "clip"), before)
    again.save_pretrained(tmp_path)
    loaded = load_adapter(build("clip"), tmp_path)
    assert torch.equal(outputs(loaded, "clip"), outputs(again, "clip"))


def test_penalty_is_the_mean_distance_from_orthogonal():
    model = adapted("clip", sites=["q"], branches=["text"])
    distances = []
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            m = parameter.detach().double()
            rows = [m[i] for i in range(6)] if "lora_A" in name else [m[:, i] for i in range(6)]
            square = sum(
                (float(a @ b) - (i == j)) ** 2
                for i, a in enumerate(rows)
                for j, b in enumerate(rows)
            )
            distances.append(math.sqrt(square))
    assert len(distances) == 4
    expected = sum(distances) / 4
    assert regularization_loss(model).item() == pytest.approx(expected, rel=1e-5)
    hooks = AdaLoraHooks(model, 10, seed=0)
    assert hooks.penalty().item() == pytest.approx(0.1 * expected, rel=1e-5)
    assert AdaLoraHooks(adapted("clip", orthogonality=0.0), 10, seed=0).penalty() is None


def test_penalty_is_not_rounded_under_autocast():
    model = adapted("clip")
    expected = regularization_loss(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(regularization_loss(model), expected)


class GivesLoss(nn.Module):
    """A model that returns its own loss, as transformers' do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return SimpleNamespace(loss=self.linear(x).square().mean())


def test_penalty_is_added_once_to_a_loss_that_the_model_gives(tmp_path):
    """PeftModel calls the tuner's forward, which adds it, where the config has a task type."""
    torch.manual_seed(0)
    settings = peft.AdaLoraConfig(target_modules=["linear"], init_r=3, target_r=1, total_step=9)
    model = peft.get_peft_model(GivesLoss(), settings)
    tuner, x = model.base_model, torch.randn(5, 4)
    task = model(x).loss
    assert torch.equal(tuner.eval()(x).loss, task)
    penalty = 0.5 * regularization_loss(model)
    torch.testing.assert_close(tuner.train()(x).loss, task + penalty)
    hooks = AdaLoraHooks(model, 9, seed=0)
    assert torch.equal(tuner(x).loss, task)
    torch.testing.assert_close(hooks.penalty(), penalty)
    hooks.finish()
    torch.testing.assert_close(tuner(x).loss, task + penalty)
    model.save_pretrained(tmp_path)
    frozen = peft.PeftModel.from_pretrained(GivesLoss(), str(tmp_path)).base_model
    assert torch.equal(frozen.train()(x).loss, frozen.model(x).loss)


def test_run_logs_the_penalty_and_its_loss_holds_it(tmp_path):
    model = make_model(dropout=0.0, method="adalora")
    penalty = 0.5 * regularization_loss(model).item()
    task = FakeTask()
    task.set_epoch(0)
    options = TrainingOptions(epochs=4, batch_size=22, log_every=1, device="cpu")
    with torch.no_grad():
        batch = task.collate([task.train_dataset[i] for i in range(22)])
        first = float(task.loss(model, batch)[0])
    train(model, task, options, tmp_path, progress=False)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["penalty"] == pytest.approx(penalty, rel=1e-5)
    assert line["loss"] == pytest.approx(first + penalty, rel=1e-5)


class Dies(FakeTask):
    """Ends the run before a step, as a crash does."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def loss(self, model, batch):
        if self.losses + 1 == self.step:
            raise InterruptedError
        return super().loss(model, batch)


@pytest.mark.parametrize("step", [3, 6, 9], ids=["scored", "cutting", "cut"])
def test_resumed_run_cuts_the_same_ranks(step, tmp_path):
    """Ten steps: ranks are cut from the second to the seventh."""
    options = TrainingOptions(
        epochs=2, batch_size=4, lr=1e-2, log_every=1, save_every=1, device="cpu"
    )
    whole, cut, resumed = (make_model(method="adalora") for _ in range(3))
    train(whole, FakeTask(), options, tmp_path / "whole", progress=False)
    with pytest.raises(InterruptedError):
        train(cut, Dies(step), options, tmp_path / "cut", progress=False)
    train(resumed, FakeTask(), options, tmp_path / "cut", resume=True, progress=False)
    patterns = [m.peft_config["default"].rank_pattern for m in (whole, resumed)]
    assert patterns[0] == patterns[1]
    assert sum(sum(kept) for kept in patterns[0].values()) == 2 * 2
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
    logs = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_scores_go_on_from_their_state():
    model = adapted("clip")
    hooks = AdaLoraHooks(model, 20, seed=0)
    gradient_step(model, hooks, 1)
    gradient_step(model, hooks, 3)  # the first cut comes with the third step
    state = {n: t.clone() for n, t in hooks.state_dict().items()}
    kinds = [n.partition(".")[0] for n in state]
    weights = len(lambdas(model))
    assert kinds.count("sensitivity") == kinds.count("uncertainty") == 3 * weights
    assert kinds.count("kept") == weights
    again = AdaLoraHooks(model, 20, seed=0)
    again.load_state_dict(state)
    gradient_step(model, again, 4)
    found = again.state_dict()
    for name, p in model.named_parameters():
        if p.requires_grad:
            key = name.removeprefix("base_model.model.")
            now = (p * p.grad).abs()
            smooth = 0.85 * state[f"sensitivity.{key}"] + (1 - 0.85) * now
            spread = 0.85 * state[f"uncertainty.{key}"] + (1 - 0.85) * (now - smooth).abs()
            if ".lora_E." not in name:  # those are cut after they are scored
                torch.testing.assert_close(found[f"sensitivity.{key}"], smooth)
                torch.testing.assert_close(found[f"uncertainty.{key}"], spread)


def gradient_step(model, hooks, step):
    """Gradients of a batch of the step's own, and what the method does with them."""
    model.zero_grad()
    case = BACKBONES["clip"]
    found = case.outputs(model, backbone_of(model), case.batch(step, 3))
    found.pow(3).sum().backward()
    hooks.after_step(step)


def test_schedule_is_stretched_to_the_run():
    model = adapted("clip")
    config = model.peft_config["default"]
    assert (config.tinit, config.tfinal, config.total_step) == (100, 300, 1000)
    AdaLoraHooks(model, 40, seed=0)
    assert (config.tinit, config.tfinal, config.total_step) == (4, 12, 40)


@pytest.mark.parametrize("steps", [1, 2])
def test_run_too_short_to_cut_is_refused(steps):
    with pytest.raises(ValueError, match=rf"of {steps} steps.*Train longer"):
        AdaLoraHooks(adapted("clip", final_share=0.6), steps, seed=0)


def test_weight_that_the_task_does_not_use_is_named():
    model = adapted("clip")
    hooks = AdaLoraHooks(model, 10, seed=0)
    view = backbone_of(model)
    images = view.encode_image(model, BACKBONES["clip"].batch(0, 3)["pixel_values"])
    images.sum().backward()
    with pytest.raises(ValueError, match=r"text_model.*has none.*tuner\.branches"):
        hooks.after_step(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_rank": 12}, r"target_rank must be in 1\.\.11"),
        ({"initial_share": 0.5, "final_share": 0.5}, "below 1"),
        ({"final_share": 1.2}, r"final_share must be in \[0, 1\)"),
        ({"delta_t": 0}, "delta_t"),
        ({"beta2": 1.0}, "beta2"),
        ({"orthogonality": -1.0}, "orthogonality"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AdaLoraOptions(**settings)
