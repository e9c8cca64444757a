"""AdapterFusion: attention over frozen adapters, kept in one file."""

import json
import shutil

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mmtune import load_adapter
from mmtune.backbones import backbone_of
from mmtune.conformance.backbones import BACKBONES, build
from mmtune.tuners import registry
from mmtune.tuners.bottleneck import AdaptedLinear, AdapterConfig
from mmtune.tuners.fusion import AdapterFusionConfig, FusedLinear, Fusion
from mmtune.tuners.registry import hooks_for
from mmtune.tuners.sited import AdapterMismatchError

BANK = ("down", "down_bias", "up", "up_bias")


def outputs(model, view, backbone="clip", seed=0):
    return BACKBONES[backbone].outputs(model, view, BACKBONES[backbone].batch(seed, 3))


def randomise(model, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.3, generator=g)


def adapter(folder, seed, backbone="clip", **settings):
    """Write a random adapter; returns the folder as a config names it."""
    model = build(backbone)
    config = AdapterConfig(**({"bottleneck": 4} | settings))
    wrapped = peft.get_peft_model(model, config)
    randomise(wrapped, seed)
    wrapped.save_pretrained(folder)
    return str(folder)


def fuse(adapters, backbone="clip", **settings):
    model = build(backbone)
    config = AdapterFusionConfig(adapters=adapters, **settings)
    return peft.get_peft_model(model, config).eval(), backbone_of(model)


def ends(model, kind):
    return {n: m for n, m in model.named_modules() if isinstance(m, kind)}


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("backbone", ["clip", "open_clip", "blip-retrieval"])
def test_one_adapter_fused_is_that_adapter(backbone, parallel, tmp_path):
    """Bit for bit: one adapter's weight is 1, and V the identity."""
    settings = {"parallel": parallel, "scale": 2.0, "activation": "relu"}
    folder = adapter(tmp_path / "a", 1, backbone, **settings)
    alone = load_adapter(build(backbone), folder).eval()
    fused, view = fuse({"a": folder}, backbone)
    fused.requires_grad_(False)
    with torch.no_grad():
        want = outputs(alone, backbone_of(alone.get_base_model()), backbone)
        assert torch.equal(outputs(fused, view, backbone), want)


def test_fresh_fusion_is_a_weighted_mean_of_the_adapters(tmp_path):
    """Each layer's output computed from the three adapters' own models; then with any Q, K, V."""
    folders = {name: adapter(tmp_path / name, seed) for seed, name in enumerate("abc")}
    fused, _ = fuse(folders, seed=0)
    fused.double()
    alone = [ends(load_adapter(build("clip"), f).double(), AdaptedLinear) for f in folders.values()]
    g = torch.Generator().manual_seed(0)
    layers = ends(fused, FusedLinear)
    assert len(layers) == 8
    for name, layer in layers.items():
        x = torch.randn(2, 3, layer.in_features, dtype=torch.float64, generator=g)
        fusion = layer.mmtune_adapter["default"]
        with torch.no_grad():
            base = layer.base_layer(x)
            theirs = [model[name](x) for model in alone]  # with the residual path around them
            for _ in range(2):
                q = base @ fusion.query.T + fusion.query_bias
                scores = torch.stack(
                    [(q * (y @ fusion.key.T + fusion.key_bias)).sum(-1) for y in theirs]
                )
                weights = scores.exp() / scores.exp().sum(0)
                mean = sum(w[..., None] * (y - base) for w, y in zip(weights, theirs, strict=True))
                want = base + mean @ fusion.value.T
                assert torch.allclose(layer(x), want, atol=1e-9)
                assert weights.std(0).max() > 1e-3
                if torch.equal(fusion.value, torch.eye(len(fusion.value)).double()):
                    low, high = torch.stack(theirs).aminmax(dim=0)
                    assert bool(((layer(x) >= low - 1e-9) & (layer(x) <= high + 1e-9)).all())
                for p in fusion.parameters():
                    p.normal_(std=0.1, generator=g)


def test_query_and_key_start_small_and_value_at_the_identity():
    fused, _ = fuse({"a": "random:0", "b": "random:1"}, seed=0)
    fusions = list(ends(fused, Fusion).values())
    for kind in ("query", "key"):
        drawn = torch.cat([getattr(f, kind).flatten() for f in fusions])
        assert drawn.std().item() == pytest.approx(0.02, rel=0.05)
        assert drawn.mean().abs() < 1e-3
        assert not any(getattr(f, f"{kind}_bias").any() for f in fusions)
    assert all(torch.equal(f.value, torch.eye(len(f.value))) for f in fusions)


def test_penalty_is_the_distance_of_the_values_from_the_identity():
    fused, _ = fuse({"a": "random:0"}, penalty=0.5)
    hooks = hooks_for(fused, 10, seed=0)
    assert hooks.penalty() == 0
    want = 0.0
    g = torch.Generator().manual_seed(0)
    for fusion in ends(fused, Fusion).values():
        with torch.no_grad():
            off = 0.1 * torch.randn(fusion.value.shape, generator=g)
            fusion.value.add_(off)
        want += 0.5 * float((off**2).sum())
    penalty = hooks.penalty()
    assert penalty.item() == pytest.approx(want, rel=1e-5)
    penalty.backward()
    for fusion in ends(fused, Fusion).values():
        assert torch.allclose(fusion.value.grad, fusion.value - torch.eye(len(fusion.value)))
        assert fusion.query.grad is None


def test_frozen_bank_stays_the_trained_adapters(tmp_path):
    folders = {name: adapter(tmp_path / name, seed) for seed, name in enumerate("ab")}
    fused, view = fuse(folders)
    fused.train()
    hooks = hooks_for(fused, 3, seed=0)
    optimizer = torch.optim.AdamW([p for p in fused.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        loss = outputs(fused, view, seed=step).pow(3).sum() + hooks.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not any(
        torch.equal(f.value, torch.eye(len(f.value))) for f in ends(fused, Fusion).values()
    )
    for n, folder in enumerate(folders.values()):
        saved = load_file(f"{folder}/adapter_model.safetensors")
        for name, layer in ends(fused, FusedLinear).items():
            for key in BANK:
                stored = getattr(layer.mmtune_adapter["default"], key)[n]
                assert not stored.requires_grad
                assert torch.equal(stored, saved[f"{name}.mmtune_adapter.{key}"])


def test_loads_without_the_folders_of_its_adapters(tmp_path):
    folders = {name: adapter(tmp_path / name, seed) for seed, name in enumerate("ab")}
    fused, view = fuse(folders)
    randomise(fused, 7)
    fused.save_pretrained(tmp_path / "fused")
    with torch.no_grad():
        want = outputs(fused, view)
    for folder in folders.values():
        shutil.rmtree(folder)
    text = (tmp_path / "fused" / "adapter_config.json").read_text()
    assert json.loads(text)["adapters"] == {"a": "", "b": ""}
    assert str(tmp_path) not in text
    again = load_adapter(build("clip"), tmp_path / "fused", adapter_name="other").eval()
    with torch.no_grad():
        assert torch.equal(outputs(again, backbone_of(again.get_base_model())), want)


def test_the_config_of_a_fusion_is_its_adapters(tmp_path):
    """Sites and sizes are theirs: nothing has to be said twice."""
    settings = {"bottleneck": 3, "placement": "mlp", "branches": ["text"], "layers": [1]}
    folders = {name: adapter(tmp_path / name, 0, **settings) for name in "ab"}
    options = registry.method("adapter_fusion").options(adapters=folders)
    fused = registry.apply(build("clip"), "adapter_fusion", options)
    assert list(ends(fused, Fusion)) == [
        "base_model.model.text_model.encoder.layers.1.mlp.fc2.mmtune_adapter.default"
    ]
    assert fused.get_nb_trainable_parameters()[0] == 3 * 32**2 + 2 * 32
    assert next(iter(ends(fused, Fusion).values())).down.shape == (2, 3, 32)


@pytest.mark.parametrize(
    ("changes", "setting"),
    [({"bottleneck": 5}, "bottleneck 4"), ({"placement": "mlp"}, "placement both")],
)
def test_adapters_of_different_shapes_are_refused_by_name(changes, setting, tmp_path):
    folders = {"a": adapter(tmp_path / "a", 0), "b": adapter(tmp_path / "b", 0, **changes)}
    with pytest.raises(AdapterMismatchError) as caught:
        fuse(folders)
    assert f"{tmp_path}/a has {setting}, {tmp_path}/b {next(iter(changes.values()))}" in str(
        caught.value
    )


def test_an_adapter_of_another_backbone_is_refused(tmp_path):
    folder = adapter(tmp_path / "a", 0, "open_clip")
    with pytest.raises(AdapterMismatchError, match=r"/a sits on 8 modules of the model it was tr"):
        fuse({"a": folder}, "clip")


def test_an_adapter_of_another_width_is_refused(tmp_path):
    """The same module names and other sizes, as of another CLIP."""
    folder = adapter(tmp_path / "a", 0)
    path = tmp_path / "a" / "adapter_model.safetensors"
    from safetensors.torch import save_file

    tensors = {
        k: F.pad(v, (0, 1)) if k.endswith(".down") else v for k, v in load_file(path).items()
    }
    save_file(tensors, path)
    with pytest.raises(AdapterMismatchError, match=r"down of .*/a is \[4, \d+\], and this model"):
        fuse({"a": folder})


def test_what_cannot_be_fused_is_said(tmp_path):
    with pytest.raises(ValueError, match="must name trained adapters, got none"):
        AdapterFusionConfig()
    with pytest.raises(FileNotFoundError, match="holds no adapter: adapter_config"):
        fuse({"a": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match="names no folder for b"):
        fuse({"a": "random:0", "b": ""})
    with pytest.raises(ValueError, match=r"adapter_fusion\.penalty must be 0 or more"):
        AdapterFusionConfig(adapters={"a": "random:0"}, penalty=-1)
    with pytest.raises(ValueError, match="expected random:SEED with a number, got 'random:x'"):
        fuse({"a": "random:x"})
    norms = adapter(tmp_path / "norms", 0, train_norms=True)
    with pytest.raises(ValueError, match="Train it with train_norms: false to fuse it"):
        fuse({"a": norms})
    fused, _ = fuse({"a": "random:0"})
    fused.save_pretrained(tmp_path / "fused")
    with pytest.raises(ValueError, match="fused holds ADAPTER_FUSION"):
        fuse({"a": str(tmp_path / "fused")})
