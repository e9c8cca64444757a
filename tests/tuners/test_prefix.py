"""Prefix tuning: counts, eject, settings, cached decoding, stacking on LoRA."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file

from mmtune import AuroraConfig, load_adapter
from mmtune.backbones import SiteError, backbone_of
from mmtune.conformance.backbones import (
    BACKBONES,
    Tower,
    build,
    images_and_texts,
    pair_embeddings,
)
from mmtune.conformance.counts import prefix_count
from mmtune.tuners import registry, stacking
from mmtune.tuners.prefix import PrefixConfig, eject
from mmtune.tuners.presets import LoraOptions
from mmtune.tuners.sited import AdapterMismatchError
from mmtune.tuners.unipelt import UniPELTConfig


def wrap(backbone, seed=0, model=None, **settings):
    """A prefix with a random start on a tiny backbone, in eval mode: (PeftModel, view)."""
    model = build(backbone) if model is None else model
    view = backbone_of(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, PrefixConfig(**settings))
    return wrapped.eval(), view


def embeddings(model, view, seed=0):
    with torch.no_grad():
        return pair_embeddings(model, view, images_and_texts(seed, 3))


def count(model):
    return model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("flat", [False, True])
def test_count_written_out_for_one_branch(flat):
    """The text tower of 2 layers of width 32: p d + (d m + m) + (2 L d m + 2 L d), or 2 L p d."""
    wrapped, _ = wrap("clip", branches=["text"], tokens=5, bottleneck=7, reparameterise=not flat)
    want = 5 * 32 + (32 * 7 + 7) + (2 * 2 * 32 * 7 + 2 * 2 * 32)
    assert count(wrapped) == (2 * 2 * 5 * 32 if flat else want)


def test_published_sizes():
    """BERT-base's layout (12 layers, d 768), p = 30, m = 512: 9.9 M trained, 0.55 M kept."""
    towers = {"text": Tower(12, 768, 3072, norms=0)}
    assert prefix_count(towers, 30, 512) == 9_872_384 == 23_040 + 393_728 + 9_455_616
    assert prefix_count(towers, 30) == 552_960


def test_layers_and_branches_choose():
    wrapped, view = wrap("clip", branches=["vision"], layers="last:1", tokens=2, bottleneck=3)
    assert wrapped.peft_config["default"].adapted == ["vision_model.encoder.layers.1.self_attn"]
    with torch.no_grad():
        base = build("clip")
        batch = images_and_texts(0, 3)
        before = pair_embeddings(base, backbone_of(base), batch)
        after = pair_embeddings(wrapped, view, batch)
    assert torch.equal(after[3:], before[3:])  # texts
    assert not torch.allclose(after[:3], before[:3])


@pytest.mark.parametrize("backbone", ["open_clip", "clip"])
def test_eject_keeps_the_outputs_bit_for_bit_and_shrinks_the_file(backbone, tmp_path):
    wrapped, view = wrap(backbone, tokens=3, bottleneck=40)
    want = embeddings(wrapped, view)
    wrapped.save_pretrained(tmp_path / "whole")
    eject(wrapped)
    assert torch.equal(embeddings(wrapped, view), want)
    assert count(wrapped) == 2 * 2 * 3 * (48 + 32)
    wrapped.save_pretrained(tmp_path / "flat")
    sizes = {
        kind: sum(
            t.numel() for t in load_file(tmp_path / kind / "adapter_model.safetensors").values()
        )
        for kind in ("whole", "flat")
    }
    assert sizes == {"whole": sum(3 * d + d * 40 + 40 + 4 * d * 41 for d in (48, 32)), "flat": 960}
    model = build(backbone)
    again = load_adapter(model, tmp_path / "flat").eval()
    assert again.peft_config["default"].reparameterise is False
    assert torch.equal(embeddings(again, backbone_of(model)), want)


def test_an_ejected_prefix_trains_and_cannot_be_ejected_again():
    wrapped, view = wrap("clip", tokens=3, bottleneck=4)
    eject(wrapped)
    before = embeddings(wrapped, view)
    pair_embeddings(wrapped, view, images_and_texts(0, 2)).sum().backward()
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p -= p.grad.sign()
    assert not torch.allclose(embeddings(wrapped, view), before)
    with pytest.raises(ValueError, match="flat already"):
        eject(wrapped)


def test_eject_is_of_prefixes_only():
    model = build("clip")
    lora = registry.apply(model, "lora", LoraOptions())
    with pytest.raises(ValueError, match="is no prefix"):
        eject(lora)


def test_eject_leaves_the_other_adapter_alone():
    wrapped, view = wrap("clip", tokens=3, bottleneck=4)
    wrapped.add_adapter("second", PrefixConfig(tokens=2, bottleneck=5))
    wrapped.set_adapter("second")
    want = embeddings(wrapped, view)
    eject(wrapped, "default")
    assert torch.equal(embeddings(wrapped, view), want)
    assert wrapped.peft_config["second"].reparameterise


@pytest.mark.parametrize("key", ["tokens", "bottleneck"])
def test_settings_below_one_are_refused(key):
    with pytest.raises(ValueError, match=f"prefix.{key} must be at least 1, got 0"):
        PrefixConfig(**{key: 0})


def test_a_branch_without_attention_is_refused_with_what_it_has():
    with pytest.raises(SiteError, match="projector; it has head"):
        wrap("llava", branches=["projector"])


def test_longer_than_the_context_works():
    wrapped, view = wrap("clip", tokens=100, bottleneck=4)
    assert embeddings(wrapped, view).isfinite().all()


def test_unloaded_model_is_the_base():
    base = build("clip")
    before = embeddings(base, backbone_of(base))
    wrapped, _ = wrap("clip", model=base, tokens=3, bottleneck=4)
    stock = wrapped.unload()
    assert stock is base
    assert not hasattr(base, "prefixes")
    assert torch.equal(embeddings(base, backbone_of(base)), before)


def test_a_deep_copy_has_a_prefix_of_its_own():
    wrapped, view = wrap("clip", tokens=3, bottleneck=4)
    want = embeddings(wrapped, view)
    twin = copy.deepcopy(wrapped)
    with torch.no_grad():
        for p in twin.parameters():
            if p.requires_grad:
                p.add_(1)
    assert torch.equal(embeddings(wrapped, view), want)
    assert not torch.allclose(embeddings(twin, backbone_of(twin)), want)


def test_two_active_adapters_stand_beside_one_another():
    """Softmax does not care about order: two prefixes of 2 and 3 are one of 5."""
    both, view = wrap("clip", tokens=2, reparameterise=False)
    both.add_adapter("second", PrefixConfig(tokens=3, reparameterise=False))
    both.base_model.set_adapter(["default", "second"])
    one, one_view = wrap("clip", tokens=5, reparameterise=False)
    first, second = (both.prefixes.mmtune_keys[n] for n in ("default", "second"))
    with torch.no_grad():
        for key, value in one.prefixes.mmtune_keys["default"].items():
            value.copy_(torch.cat([second[key], first[key]]))
    assert torch.allclose(embeddings(both, view), embeddings(one, one_view), atol=1e-6)


@pytest.mark.parametrize("backbone", ["llava", "blip2-opt", "blip2-t5", "blip-caption"])
def test_cached_decoding_equals_uncached(backbone):
    wrapped, _ = wrap(backbone, tokens=3, reparameterise=False)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.mul_(30)
    batch = BACKBONES[backbone].batch(0, 2)
    inputs = {"pixel_values": batch["pixel_values"]}
    if backbone == "blip-caption":
        inputs["input_ids"] = batch["input_ids"][:, :2]
    else:
        # Equal lengths: what generation makes of right padding is not the matter here.
        inputs["input_ids"] = batch["input_ids"][:1].repeat(2, 1)
        inputs["attention_mask"] = batch["attention_mask"][:1].repeat(2, 1)
    options = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    with torch.no_grad():
        runs = [wrapped.generate(**inputs, use_cache=c, **options) for c in (True, False)]
        with wrapped.disable_adapter():
            base = wrapped.generate(**inputs, use_cache=True, **options)
    cached, uncached, base = (torch.stack(run.logits) for run in (*runs, base))
    assert torch.allclose(cached, uncached, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(cached[0], base[0], atol=1e-2)


def lora_and_prefix(model):
    """A LoRA with a random update, and a prefix on top of it."""
    view = backbone_of(model)
    lora = registry.apply(model, "lora", LoraOptions(rank=2)).eval()
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(0))
    alone = embeddings(lora, view)
    return lora, stacking.stack(lora, PrefixConfig(tokens=3, seed=0), "prefix").eval(), view, alone


def test_a_prefix_on_lora_switches_off_to_exactly_the_lora_model():
    model = build("clip")
    base = embeddings(model, backbone_of(model))
    lora, both, view, alone = lora_and_prefix(model)
    stacked = embeddings(both, view)
    assert not torch.allclose(stacked, alone)
    with stacking.without(both):
        assert torch.equal(embeddings(both, view), alone)
    with stacking.without(lora):
        prefix_only = embeddings(both, view)
    assert not torch.allclose(prefix_only, stacked)
    with stacking.without(lora), stacking.without(both):
        assert torch.equal(embeddings(both, view), base)
    assert torch.equal(embeddings(both, view), stacked)


def test_both_of_a_stack_train():
    _, both, view, _ = lora_and_prefix(build("clip"))
    pair_embeddings(both, view, images_and_texts(0, 2)).pow(3).sum().backward()
    moved = {n for n, p in both.named_parameters() if p.requires_grad}
    assert any("lora_A" in n for n in moved)
    assert any("mmtune_keys" in n for n in moved)
    assert all(p.grad is not None for n, p in both.named_parameters() if n in moved)
    with stacking.without(both):
        pass
    assert {n for n, p in both.named_parameters() if p.requires_grad} == moved


def test_each_of_a_stack_is_saved_and_loaded_by_itself(tmp_path):
    lora, both, view, alone = lora_and_prefix(build("clip"))
    want = embeddings(both, view)
    stacking.save(lora, tmp_path / "lora")
    stacking.save(both, tmp_path)
    files = [tmp_path / n / "adapter_model.safetensors" for n in ("lora", "prefix")]
    keys = [set(load_file(f)) for f in files]
    assert all("lora_" in k for k in keys[0])
    assert all("mmtune_keys" in k for k in keys[1])
    model = build("clip")
    loaded_lora = load_adapter(model, tmp_path / "lora").eval()
    assert torch.equal(embeddings(loaded_lora, backbone_of(model)), alone)
    loaded = stacking.load(loaded_lora, tmp_path / "prefix", "other").eval()
    assert torch.equal(embeddings(loaded, backbone_of(model)), want)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_stack_refuses_what_it_cannot_hold(tmp_path):
    _, both, view, _ = lora_and_prefix(build("clip"))
    want = embeddings(both, view)
    with pytest.raises(ValueError, match="'prefix' is in the model already"):
        stacking.stack(both, PrefixConfig(), "prefix")
    with pytest.raises(ValueError, match="PREFIX already"):
        stacking.stack(both, PrefixConfig(), "more")
    with pytest.raises(SiteError, match="virtual keys of another method"):
        stacking.stack(both, UniPELTConfig(), "more")
    assert torch.equal(embeddings(both, view), want)
    # A refusal leaves the stack as it was: a third method, which starts at nothing, goes on top.
    third = stacking.stack(both, AuroraConfig(rank=4), "third").eval()
    assert torch.equal(embeddings(third, view), want)
    stacking.save(both, tmp_path)
    other = registry.apply(build("open_clip"), "lora", LoraOptions())
    with pytest.raises(AdapterMismatchError):
        stacking.load(other, tmp_path / "prefix", "prefix")
