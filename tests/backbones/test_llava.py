"""LLaVA with Llama and with Qwen2."""

from collections import Counter

import pytest
import torch
from transformers import CLIPImageProcessor

from mmtune.backbones import backbone_of
from mmtune.backbones.attention import extend
from mmtune.conformance import mllms

from . import mllm_checks as checks
from .virtual import inside

ROLES = {
    "vision": ["q", "k", "v", "out", "fc1", "fc2"],
    "projector": ["head"],
    "language": ["q", "k", "v", "out", "gate", "fc1", "fc2"],
}


def llava(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = mllms.llava(**changes)
    return model.eval().requires_grad_(False)


def test_stock_needs_no_preparation():
    checks.computes_what_stock_computes("llava")
    checks.restores_exactly("llava")


def test_sites_are_where_they_say():
    _, _, view = checks.stock_and_prepared("llava")
    checks.sites_are_where_they_say(view)


@pytest.mark.parametrize("language", ["llama", "qwen2", "mistral"])
def test_every_branch_has_its_parts(language):
    view = backbone_of(llava(language=language))
    counts = Counter((s.branch, s.role) for s in view.sites())
    for branch in ("vision", "language"):
        assert all(counts[branch, role] == 2 for role in (*ROLES[branch], "layer", "mlp"))
        assert counts[branch, "norm"] == 5
        assert counts[branch, "embed"] == 1
    assert [s.layer for s in view.select(["projector"], ["head"])] == [0, 0]
    assert [s.path for s in view.select(["language"], ["gate"], [1])] == [
        "model.language_model.layers.1.mlp.gate_proj"
    ]
    assert [s.path for s in view.select(["language"], ["head"])] == ["lm_head"]


@pytest.mark.parametrize(
    ("feature_layer", "read"), [(-1, 3), (-2, 2), (1, 1), ([-3, 0], 1), ([1, -2], 2)]
)
def test_only_vision_layers_that_are_read_are_sites(feature_layer, read):
    """A layer is a site exactly where a gradient reaches it."""
    model = llava(vision_feature_layer=feature_layer)
    view = backbone_of(model)
    model.requires_grad_(True)
    model(**checks.inputs("llava")).logits.sum().backward()
    layers = model.model.vision_tower.encoder.layers
    reached = [layer.self_attn.out_proj.weight.grad is not None for layer in layers]
    assert reached == [True] * read + [False] * (3 - read)
    assert [s.layer for s in view.select(["vision"], ["q"])] == list(range(read))


def test_pairs_are_refused_with_the_way_out():
    model = llava()
    with pytest.raises(TypeError, match=r"LlavaForConditionalGeneration writes text.*CLIP"):
        backbone_of(model).embed_pairs(model, {})


@pytest.mark.parametrize("method", ["lora", "aurora"])
@pytest.mark.parametrize("branch", ROLES)
def test_every_branch_is_adapted_disabled_and_merged(method, branch):
    checks.adapts_and_merges("llava", method, branch, ROLES[branch])


def test_cached_decoding_equals_uncached_with_virtual_tokens():
    checks.caches_virtual_tokens("llava")


def test_padding_does_not_reach_virtual_tokens():
    checks.padding_does_not_reach_virtual_tokens("llava")


@pytest.mark.parametrize("at", [(0, 0, 0), (4, 4, 4), (0, 2, 99)])
@torch.no_grad()
def test_virtual_words_are_a_longer_prompt(at):
    _, model, view = checks.stock_and_prepared("llava")
    trunk, batch = view.trunks()["language"], checks.inputs("llava")
    extra = checks.tokens(trunk, 3)
    words = checks.received(model, trunk.module, batch)["inputs_embeds"]
    ones = torch.ones(3, 1, dtype=torch.long)
    mask = checks.spliced(batch["attention_mask"][..., None], ones, at)[..., 0]
    longer = checks.spliced(words, extra, at)
    out = model.model.language_model(inputs_embeds=longer, attention_mask=mask)
    want = model.lm_head(out.last_hidden_state[:, checks.kept(words.shape[1], at)])
    real = batch["attention_mask"].bool()
    with inside(trunk, extra, at):
        assert checks.close(model(**batch).logits[real], want[real])


@torch.no_grad()
def test_packed_samples_and_other_masks_are_refused():
    _, model, view = checks.stock_and_prepared("llava")
    trunk, ids = view.trunks()["language"], torch.arange(3, 9)[None]
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with inside(trunk, checks.tokens(trunk, 2), (0, 0)):
        with pytest.raises(ValueError, match="packed samples"):
            model(input_ids=ids, position_ids=packed)
        with pytest.raises(ValueError, match=r"attention_mask as \[b, t\], got \[1, 1, 6, 6\]"):
            model(input_ids=ids, attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))
        # Without padding: a mask of ones, none, or positions alone say the same.
        want = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert checks.close(model(input_ids=ids).logits, want)
        counted = model(input_ids=ids, position_ids=torch.arange(6)[None]).logits
        assert checks.close(counted, want)


@pytest.mark.parametrize(("strategy", "dropped"), [("default", 1), ("full", 0)])
@torch.no_grad()
def test_virtual_patches_leave_before_the_projector(strategy, dropped):
    model = llava(vision_feature_select_strategy=strategy)
    trunk = backbone_of(model).trunks()["vision"]
    pixels = checks.inputs("llava")["pixel_values"]
    extra, at = checks.tokens(trunk, 3), (1, 1, 3)
    tower = model.model.vision_tower
    x = checks.spliced(tower.pre_layrnorm(tower.embeddings(pixels)), extra, at)
    for layer in tower.encoder.layers[:2]:
        x = layer(x, attention_mask=None)
    want = model.model.multi_modal_projector(x[:, checks.kept(5, at)[dropped:]])
    with inside(trunk, extra, at):
        found = torch.stack(list(model.get_image_features(pixels).pooler_output))
        assert checks.close(found, want)
        plain = {"input_ids": torch.arange(3, 9)[None]}
        assert model(**plain).logits.shape == (1, 6, 60)
    with inside(trunk, extra, (0, 1, 1)):
        if dropped:
            with pytest.raises(ValueError, match="behind its class token"):
                model.get_image_features(pixels)


@torch.no_grad()
def test_virtual_keys_of_grouped_query_attention():
    """Fewer heads of keys than of queries; cached decoding sees the keys of every step once."""
    _, model, view = checks.stock_and_prepared("llava")
    batch = checks.padded_left(checks.inputs("llava"))
    plain = checks.greedy(model, batch, 4)
    extra = 0.5 * torch.randn(2, 1, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    attentions = [s.module for s in view.select(["language"], ["attention"])]
    for module in attentions:
        extend(module, lambda keys: tuple(extra.expand(2, len(keys), -1, -1, -1)))
    found = checks.greedy(model, batch, 4)
    assert not checks.close(found, plain)
    assert torch.allclose(checks.cached(model, batch, 4), found, atol=1e-5)
    for module in attentions:
        extend(module, None)
    assert torch.equal(checks.greedy(model, batch, 4), plain)


def test_loaded_by_name(tmp_path):
    loaded = checks.loads_by_name("llava", tmp_path, CLIPImageProcessor(size={"shortest_edge": 32}))
    assert (loaded.image.size, loaded.image.resize) == (32, "shortest")
    assert loaded.context_length == 64


def test_gradient_checkpointing_reaches_every_layer():
    _, _, view = checks.stock_and_prepared("llava")
    layers = [s.module for s in view.select(None, ["layer"])]
    assert view.set_gradient_checkpointing()
    assert all(layer.gradient_checkpointing for layer in layers)
    view.set_gradient_checkpointing(False)
    assert not any(layer.gradient_checkpointing for layer in layers)
