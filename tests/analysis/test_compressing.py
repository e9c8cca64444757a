"""Compressed adapters: loaded again, they are the decomposition, and what they say they are."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mmtune import load_adapter, merge
from mmtune.analysis import compressing, sources
from mmtune.analysis.compressing import RECORD, compress
from mmtune.analysis.decompositions import numbers
from mmtune.analysis.deltas import adapter_deltas, stacked
from mmtune.conformance.backbones import BACKBONES
from tests.analysis import made


def source_of(config, tmp_path, name="open_clip", **settings):
    folder = made.save(made.wrap(config, name, **settings), tmp_path / "source")
    return sources.find(folder, base=f"test:{name}")


def squeeze(source, out, rank, **settings):
    return compress(source, out, rank, **{"progress": False, "starts": 3, **settings})


def read(folder, name="open_clip"):
    """path -> update of a saved adapter."""
    loaded = made.load(f"test:{name}")
    loaded.backbone.prepare()
    sites = loaded.backbone.sites()
    return {
        d.site.path: d.weight for d in adapter_deltas(load_adapter(loaded.model, folder), sites)
    }


def outputs(folder, name="open_clip"):
    """What the stock model says with the adapter merged into its weights."""
    loaded = made.load(f"test:{name}")
    case = BACKBONES[name]
    merged = merge(load_adapter(loaded.model, folder))
    with torch.no_grad():
        return case.outputs(merged, loaded.backbone, case.batch(0, 3))


def relative(found, wanted):
    keys = list(wanted)
    return float(
        torch.cat([(found[k] - wanted[k]).flatten() for k in keys]).norm()
        / torch.cat([wanted[k].flatten() for k in keys]).norm()
    )


def size(fit):
    """[d_out, d_in, M]: the sum of the terms' sizes, to which float32 rounds."""
    core = None if fit.core is None else fit.core.abs()
    return replace(fit, factors=tuple(f.abs() for f in fit.factors), core=core).whole()


# Four roundings of each term (its three factors and core), and as many again in the products.
ROUNDING = {"atol": 10 * torch.finfo(torch.float32).eps, "rtol": 0}


def plant_cp(model, rank):
    """Make a LoRA of this rank the sum of `rank` components that all weights of a shape share."""
    generator = torch.Generator().manual_seed(5)
    shared = {}
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                key = (len(b), a.shape[1])
                if key not in shared:
                    shared[key] = [torch.randn(t.shape, generator=generator) for t in (a, b)]
                a.copy_(shared[key][0])
                b.copy_(shared[key][1] * torch.randn(rank, generator=generator))


@pytest.mark.parametrize("guess", [True, False])
def test_aurora_of_a_rank_is_recovered_at_that_rank(guess, tmp_path):
    source = source_of(made.aurora(rank=3), tmp_path)
    if not guess:
        source = replace(source, learned=())
    found = squeeze(source, tmp_path / "out", 3)
    assert found.error < 1e-5
    assert relative(read(tmp_path / "out"), read(tmp_path / "source")) < 1e-5
    want = outputs(tmp_path / "source")
    torch.testing.assert_close(outputs(tmp_path / "out"), want, atol=1e-4, rtol=1e-4)


def test_dense_aurora_is_recovered_by_a_dense_core(tmp_path):
    source = source_of(made.aurora(rank=3, core="dense", alpha=0.5), tmp_path)
    assert squeeze(source, tmp_path / "out", 3, core="dense").error < 1e-5
    assert relative(read(tmp_path / "out"), read(tmp_path / "source")) < 1e-5


def test_lora_that_is_a_sum_of_shared_components_is_reproduced(tmp_path):
    model = made.wrap(made.lora(rank=2, sites=["q", "k", "v"]))
    plant_cp(model, 2)
    source = sources.find(made.save(model, tmp_path / "source"), base="test:open_clip")
    found = squeeze(source, tmp_path / "out", 2)
    assert found.error < 1e-5
    assert found.before == 2 * 3 * (2 * (48 + 48) + 2 * (32 + 32))
    assert found.after == sum(numbers("cp", (d, d, 6), 2) for d in (48, 32))
    want = outputs(tmp_path / "source")
    torch.testing.assert_close(outputs(tmp_path / "out"), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("core", ["diagonal", "dense"])
@pytest.mark.parametrize("rank", [2, 24])
def test_the_adapter_is_the_decomposition(core, rank, tmp_path, monkeypatch):
    """Rank 24 exceeds the number of blocks in a stack, 20."""
    fits = []
    fit = compressing._fit
    monkeypatch.setattr(compressing, "_fit", lambda *a: fits.append(fit(*a)) or fits[-1])
    source = source_of(made.lora(rank=2), tmp_path)
    wanted = {delta.site.path: delta.weight for delta in source.deltas}
    found = squeeze(source, tmp_path / "out", rank, core=core, starts=2)
    updates = read(tmp_path / "out")
    for stack, one in zip(stacked(source.deltas), fits, strict=True):
        again = stacked([replace(d, weight=updates[d.site.path]) for d in source.deltas])
        tensor = next(s.tensor for s in again if s.key == stack.key)
        torch.testing.assert_close(tensor.double() / size(one), one.whole() / size(one), **ROUNDING)
    assert found.error == pytest.approx(relative(updates, wanted), abs=1e-6)
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["error"] == found.error
    assert [p["role"] for p in record["parts"]] == ["q", "v", "fc1", "fc2"] * 2
    part = next(p for p in record["parts"] if (p["branch"], p["role"]) == ("text", "fc2"))
    paths = [d.site.path for d in source.deltas if (d.site.branch, d.site.role) == ("text", "fc2")]
    want = {path: wanted[path] for path in paths}
    assert part["error"] == pytest.approx(relative(updates, want), abs=1e-6)


@pytest.mark.parametrize(("core", "mixing"), [("diagonal", 4), ("dense", 4**3)])
def test_counts_are_those_of_the_file(core, mixing, tmp_path):
    source = source_of(made.lora(rank=2), tmp_path)
    found = squeeze(source, tmp_path / "out", 4, core=core, starts=1)
    file = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found.after == sum(t.numel() for t in file.values())
    assert found.after == sum(4 * (d + d + 20) + mixing for d in (48, 32))


def test_components_are_scaled_as_in_a_fresh_adapter(tmp_path):
    squeeze(source_of(made.lora(rank=2), tmp_path), tmp_path / "out", 4)
    file = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key, tensor in file.items():
        if "aurora_U" in key:
            torch.testing.assert_close(tensor.norm(dim=1), torch.ones(4))
        if "aurora_core" in key:
            assert torch.equal(tensor, torch.ones(4))
    modes = torch.cat([t for key, t in file.items() if "modes" in key and "visual" in key])
    torch.testing.assert_close(modes.square().mean(0), torch.ones(4))


@pytest.mark.parametrize("layers", ["last:1", "first:1", [0]])
def test_only_the_layers_that_were_adapted_are(layers, tmp_path):
    source = source_of(made.lora(layers=layers), tmp_path)
    found = squeeze(source, tmp_path / "out", 2, starts=1)
    assert found.added == 0
    assert set(read(tmp_path / "out")) == {delta.site.path for delta in source.deltas}


def test_places_that_no_choice_describes_get_zeros_between_them(tmp_path):
    source = source_of(made.lora(sites=["q", "v"]), tmp_path)
    kept = [d for d in source.deltas if (d.site.role, d.site.layer) != ("v", 0)]
    source = replace(source, deltas=kept)
    found = squeeze(source, tmp_path / "out", 2, starts=1)
    assert found.added == 2
    for path, update in read(tmp_path / "out").items():
        assert update.any() == (path in {delta.site.path for delta in kept})


def test_updates_of_zeros_become_an_adapter_that_changes_nothing_and_can_be_trained(tmp_path):
    source = source_of(made.lora(), tmp_path, zero=True)
    torch.nn.init.zeros_(source.deltas[0].weight)
    assert not any(delta.weight.any() for delta in source.deltas)
    found = squeeze(source, tmp_path / "out", 2)
    assert found.error == found.norm == 0
    assert not any(update.any() for update in read(tmp_path / "out").values())
    file = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(t.any() for key, t in file.items() if "aurora_V" not in key)


def test_full_fine_tune_becomes_an_adapter(tmp_path, monkeypatch):
    base, tuned = made.load("test:clip"), made.load("test:clip")
    generator = torch.Generator().manual_seed(0)
    changed = [s for s in tuned.backbone.sites() if s.role in ("q", "v")]
    with torch.no_grad():
        for site in changed:
            u, v = (torch.randn(s, generator=generator) for s in (site.width, site.width))
            site.module.weight.add_(torch.outer(u, v), alpha=0.1)
            site.module.bias.add_(1.0)
    models = {"test:base": base, "test:tuned": tuned}
    monkeypatch.setattr("mmtune.backbones.load", lambda name: models[name])
    source = sources.find(None, base="test:base", tuned="test:tuned")
    biases = 2 * 2 * (48 + 32)
    assert source.left_out == biases
    assert source.parameters == biases + 2 * 2 * (48**2 + 32**2)
    found = squeeze(source, tmp_path / "out", 4)
    assert found.error < 1e-4
    assert found.left_out == biases
    updates = read(tmp_path / "out", "clip")
    assert set(updates) == {site.path for site in changed}


@pytest.mark.parametrize("backbone", ["blip-vqa", "siglip", "llava"])
def test_every_kind_of_branch_is_compressed(backbone, tmp_path):
    config = made.aurora(rank=2, sites=["q", "k", "v", "out"], gate="off", context="off")
    source = source_of(config, tmp_path, backbone)
    found = squeeze(source, tmp_path / "out", 2)
    assert found.error < 1e-5
    assert found.before == found.after
    want = read(tmp_path / "source", backbone)
    assert relative(read(tmp_path / "out", backbone), want) < 1e-5


def test_an_interrupted_compression_leaves_nothing(tmp_path, monkeypatch):
    source = source_of(made.lora(), tmp_path)

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(compressing, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        squeeze(source, tmp_path / "out", 2, starts=1)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
