"""Updates and their stacks against the tensors in the adapter's file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from mmtune.analysis import sources
from mmtune.analysis.deltas import stacked, weight_deltas
from mmtune.backbones import backbone_of
from tests.analysis import made

PREFIX = "base_model.model."


def whole(stack, path, wide):
    """The weight of a path put together from its blocks."""
    parts = [stack.tensor[..., m] for m, block in enumerate(stack.blocks) if block.path == path]
    return torch.cat(parts, dim=1 if wide else 0)


def test_lora_updates_are_those_of_its_file(tmp_path):
    folder = made.save(made.wrap(made.lora(rank=2, alpha=6.0)), tmp_path / "adapter")
    source = sources.find(folder, base="test:open_clip")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(source.deltas) == len(tensors) // 2 == 16
    for delta in source.deltas:
        a, b = (tensors[f"{PREFIX}{delta.site.path}.lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(delta.weight, 3.0 * b @ a)
    assert source.parameters == sum(t.numel() for t in tensors.values())
    assert source.left_out == 0


@pytest.mark.parametrize("kind", ["aurora", "lora"])
def test_blocks_put_together_are_the_updates(kind, tmp_path):
    folder = made.save(made.wrap(getattr(made, kind)()), tmp_path / "adapter")
    source = sources.find(folder, base="test:open_clip")
    stacks = {stack.key: stack for stack in stacked(source.deltas)}
    widths = {"vision": 48, "text": 32}
    assert {key: stack.tensor.shape[-1] for key, stack in stacks.items()} == {
        "48x48": 2 * (1 + 1 + 4 + 4),
        "32x32": 2 * (1 + 1 + 4 + 4),
    }
    for delta in source.deltas:
        d, site = widths[delta.site.branch], delta.site
        found = whole(stacks[f"{d}x{d}"], site.path, wide=site.role == "fc2")
        assert torch.equal(found, delta.weight)


def test_aurora_stack_is_the_sum_over_the_components_of_its_file(tmp_path):
    folder = made.save(made.wrap(made.aurora(alpha=0.5)), tmp_path / "adapter")
    source = sources.find(folder, base="test:open_clip")
    tensors = load_file(folder / "adapter_model.safetensors")
    for stack in stacked(source.deltas):
        u, v, core = (
            tensors[f"{PREFIX}mode_factors.aurora_{x}.{stack.key}"] for x in ("U", "V", "core")
        )
        paths = dict.fromkeys(block.path for block in stack.blocks)
        modes = torch.cat([tensors[f"{PREFIX}{path}.aurora_modes"] for path in paths])
        want = 0.5 * torch.einsum("or,ri,mr,r->oim", v, u, modes, core)
        torch.testing.assert_close(stack.tensor, want)


def test_quantised_base_has_no_part_in_the_updates(tmp_path):
    pytest.importorskip("bitsandbytes")
    options = {"rank": 2, "sites": ["q", "fc1"], "compute_dtype": "float32"}
    model = made.wrap(made.method("qlora", **options), name="clip")
    folder = made.save(model, tmp_path / "adapter")
    source = sources.find(folder, base="test:clip")
    tensors = load_file(folder / "adapter_model.safetensors")
    for delta in source.deltas:
        a, b = (tensors[f"{PREFIX}{delta.site.path}.lora_{x}.weight"] for x in "AB")
        scale = 16.0 / 2
        torch.testing.assert_close(delta.weight, scale * b.float() @ a.float())


def test_adalora_has_updates(tmp_path):
    model = made.wrap(made.method("adalora", init_rank=4, target_rank=2, sites=["q", "fc1"]))
    folder = made.save(model, tmp_path / "adapter")
    source = sources.find(folder, base="test:open_clip")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(source.deltas) == 8
    for delta in source.deltas:
        a, b, e = (tensors[f"{PREFIX}{delta.site.path}.lora_{x}"] for x in "ABE")
        want = 16.0 / (4 + 1e-5) * b @ (a * e)
        torch.testing.assert_close(delta.weight, want, atol=1e-6, rtol=1e-5)


def test_differences_of_two_models_leave_out_what_did_not_change():
    models = [made.load("test:open_clip").model for _ in range(2)]
    views = [backbone_of(model) for model in models]
    for view in views:
        view.prepare()
    before, after = (view.sites() for view in views)
    chosen = [s for s in after if s.role in ("k", "fc2") and s.layer == 1]
    generator = torch.Generator().manual_seed(0)
    noise = {s.path: torch.randn(s.module.weight.shape, generator=generator) for s in chosen}
    for site in chosen:
        site.module.weight += noise[site.path]
    found = weight_deltas(before, after)
    assert [delta.site.path for delta in found] == [site.path for site in chosen]
    for delta in found:
        torch.testing.assert_close(delta.weight, noise[delta.site.path], atol=1e-6, rtol=1e-5)
