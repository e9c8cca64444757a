"""AdapterDrop: which layers lose their adapters, and where the backward pass stops."""

import dataclasses

import peft
import pytest
import torch

from mmtune.backbones import SiteError, backbone_of
from mmtune.config import TrainingOptions
from mmtune.conformance.backbones import BACKBONES, build
from mmtune.training import train
from mmtune.tuners.bottleneck import AdaptedLinear, AdapterConfig
from mmtune.tuners.drop import AdapterDropConfig, RobustDrop, set_dropped
from mmtune.tuners.hooks import TrainingHooks
from mmtune.tuners.registry import hooks_for
from tests.fake_task import FakeTask


def wrap(backbone, config):
    model = build(backbone)
    wrapped = peft.get_peft_model(model, config).eval()
    view = backbone_of(model)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.normal_(std=0.3, generator=g)
    return wrapped, view


def outputs(model, view, backbone):
    return BACKBONES[backbone].outputs(model, view, BACKBONES[backbone].batch(0, 3))


def ends(model):
    """Path inside the stock model -> adapted Linear."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLinear)}


class Watched:
    """Which layers' outputs require a gradient."""

    def __init__(self, view):
        self.gradients = {}
        for site in view.sites():
            if site.role == "layer":
                site.module.register_forward_hook(self._hook((site.branch, site.layer)))

    def _hook(self, key):
        def note(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            self.gradients[key] = output.requires_grad

        return note


@pytest.mark.parametrize("robust", [False, True], ids=["specialised", "robust"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("backbone", ["open_clip", "open_clip-timm", "clip", "siglip"])
def test_backward_stops_at_the_lowest_kept_layer(backbone, checkpointing, robust):
    config = AdapterDropConfig(bottleneck=4, drop=0 if robust else 1, robust=robust)
    wrapped, view = wrap(backbone, config)
    wrapped.train()
    if checkpointing:
        view.set_gradient_checkpointing()
    if robust:
        set_dropped(wrapped, 1)
    watched = Watched(view)
    outputs(wrapped, view, backbone).pow(2).sum().backward()
    lowest = {("vision", 0): False, ("text", 0): False}
    assert watched.gradients == lowest | {("vision", 1): True, ("text", 1): True}
    for end in ends(wrapped).values():
        grads = [p.grad for p in end.parameters() if p.requires_grad]
        assert all((g is None) == (end.depth == 0) for g in grads)


def test_vision_layer_0_of_a_language_model_is_not_gone_through():
    """LLaVA's language model needs gradients down to the first kept vision layer, and no lower."""
    wrapped, view = wrap("llava", AdapterDropConfig(bottleneck=4, drop=1))
    wrapped.train()
    view.set_gradient_checkpointing()
    watched = Watched(view)
    outputs(wrapped, view, "llava").sum().backward()
    assert watched.gradients[("vision", 0)] is False
    assert watched.gradients[("vision", 1)] is True


@pytest.mark.parametrize("backbone", ["clip", "blip-retrieval", "blip2-t5"])
def test_dropped_is_absent(backbone):
    """The same as a model that never had those adapters, bit for bit, and not the same as whole."""
    whole, view = wrap(backbone, AdapterConfig(bottleneck=4, parallel=True))
    whole.requires_grad_(False)
    without, other = wrap(backbone, AdapterDropConfig(bottleneck=4, parallel=True, drop=1))
    without.requires_grad_(False)
    theirs = ends(whole)
    for name, end in ends(without).items():
        end.load_state_dict(theirs[name].state_dict())
    kept = {name for name, end in theirs.items() if end.depth > 0}
    assert set(ends(without)) == kept
    assert kept != set(theirs)
    with torch.no_grad():
        before = outputs(whole, view, backbone)
        set_dropped(whole, 1)
        assert torch.equal(outputs(whole, view, backbone), outputs(without, other, backbone))
        set_dropped(whole, 99)
        with without.disable_adapter():
            assert torch.equal(outputs(whole, view, backbone), outputs(without, other, backbone))
        set_dropped(whole, 0)
        assert torch.equal(outputs(whole, view, backbone), before)
        assert not torch.equal(outputs(without, other, backbone), before)


def test_draws_are_uniform_and_belong_to_seed_and_step():
    wrapped, _ = wrap("clip", AdapterDropConfig(bottleneck=1, robust=True))
    hooks = RobustDrop(wrapped, seed=5)
    assert hooks.layers == {"vision": 2, "text": 2}
    hooks.layers = {"vision": 24, "text": 12}
    steps = 12_000
    draws = [hooks.dropped(step) for step in range(1, steps + 1)]
    for branch, layers in hooks.layers.items():
        seen = torch.bincount(torch.tensor([d[branch] for d in draws]), minlength=layers)
        assert len(seen) == layers
        chi_square = ((seen - steps / layers) ** 2 / (steps / layers)).sum().item()
        assert chi_square < {12: 31.3, 24: 49.7}[layers]  # 99.9 % of layers - 1 degrees of freedom
    assert all(d["vision"] // 2 == d["text"] for d in draws)  # branches are cut at one height
    again = RobustDrop(wrapped, seed=5)
    again.layers = hooks.layers
    assert [again.dropped(step) for step in range(700, 800)] == draws[699:799]
    other = RobustDrop(wrapped, seed=6)
    other.layers = hooks.layers
    assert [other.dropped(step) for step in range(1, 100)] != draws[:99]


def test_a_step_drops_and_an_evaluation_after_it_sees_every_adapter():
    wrapped, _ = wrap("clip", AdapterDropConfig(bottleneck=1, robust=True))
    hooks = hooks_for(wrapped, 10, seed=5)
    assert isinstance(hooks, RobustDrop)
    seen = set()
    for step in range(1, 11):
        hooks.before_step(step)
        n = hooks.dropped(step)["text"]
        assert all(end.dropped == (end.depth < n) for end in ends(wrapped).values())
        seen.add(n)
        hooks.after_step(step)
        assert not any(end.dropped for end in ends(wrapped).values())
    assert seen == {0, 1}
    fixed, _ = wrap("clip", AdapterDropConfig(bottleneck=1, drop=1))
    assert type(hooks_for(fixed, 10, seed=5)) is TrainingHooks


class PairTask(FakeTask):
    """Pulls CLIP's image embeddings of noise towards noise."""

    def collate(self, samples):
        g = torch.Generator().manual_seed(int(1e6 * abs(float(samples[0][0]))))
        return BACKBONES["clip"].batch(0, 2) | {"target": torch.randn(2, 24, generator=g)}

    def loss(self, model, batch):
        target = batch.pop("target")
        found = model(**batch).image_embeds
        return (found - target).square().mean(), {"size": 2.0}


def test_a_resumed_run_draws_what_a_whole_one_draws(tmp_path):
    options = TrainingOptions(
        batch_size=4, lr=1e-2, log_every=1, save_every=2, device="cpu", max_steps=6, epochs=3
    )

    def run(folder, steps, resume=False):
        wrapped, _ = wrap("clip", AdapterDropConfig(bottleneck=2, robust=True))
        changed = dataclasses.replace(options, max_steps=steps, schedule="constant")
        train(wrapped, PairTask(), changed, folder, seed=1, resume=resume, progress=False)
        return {n: p.detach().clone() for n, p in wrapped.named_parameters() if p.requires_grad}

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "cut", 4)
    resumed = run(tmp_path / "cut", 6, resume=True)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "leaves out nothing: set drop"),
        ({"drop": 1, "robust": True}, "needs drop: 0, got drop: 1"),
        ({"drop": -1}, "must be 0 or more layers, got -1"),
        ({"drop": 1, "bottleneck": 0}, "adapter_drop.bottleneck must be at least 1"),
    ],
)
def test_settings_without_sense_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        AdapterDropConfig(**settings)


def test_every_branch_keeps_an_adapter():
    with pytest.raises(SiteError, match=r"drop must be in 0\.\.1 to leave an adapter in vision, g"):
        wrap("clip", AdapterDropConfig(drop=2))


def test_nothing_to_drop_is_said():
    with pytest.raises(ValueError, match="no adapters to leave out"):
        set_dropped(build("clip"), 1)
    wrapped, _ = wrap("clip", AdapterConfig(bottleneck=1))
    with pytest.raises(ValueError, match="must be 0 or more, got -1"):
        set_dropped(wrapped, -1)
