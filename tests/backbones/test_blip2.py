"""BLIP-2 with OPT and with T5."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, BlipImageProcessor

from mmtune.backbones import SiteError, backbone_of
from mmtune.backbones.attention import extend
from mmtune.conformance import mllms
from mmtune.conformance.backbones import build

from . import mllm_checks as checks
from .virtual import inside

BOTH = pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
ROLES = {
    "vision": ["q", "k", "v", "out", "fc1", "fc2"],
    "fusion": ["q", "k", "v", "out", "cross_q", "cross_k", "cross_v", "cross_out", "fc1", "fc2"],
    "projector": ["head"],
    "language": ["q", "k", "v", "out", "fc1", "fc2"],
}


@BOTH
def test_prepared_computes_what_stock_computes(name):
    checks.computes_what_stock_computes(name)


@BOTH
def test_restore_is_exact(name):
    checks.restores_exactly(name)


@BOTH
def test_sites_are_where_they_say(name):
    _, _, view = checks.stock_and_prepared(name)
    checks.sites_are_where_they_say(view)


@BOTH
def test_every_branch_has_its_parts(name):
    _, _, view = checks.stock_and_prepared(name)
    counts = Counter((s.branch, s.role) for s in view.sites())
    for branch, norms in (("vision", 5), ("fusion", 7)):
        assert all(counts[branch, role] == 2 for role in (*ROLES[branch], "layer", "attention"))
        assert counts[branch, "norm"] == norms
    assert counts["fusion", "cross_attention"] == 2
    assert (counts["vision", "mlp"], counts["fusion", "mlp"]) == (2, 0)
    assert [s.path for s in view.select(["projector"])] == ["language_projection"]
    assert counts["language", "embed"] == counts["language", "head"] == 1


def test_opt_and_t5_have_different_parts():
    opt = Counter(s.role for s in checks.stock_and_prepared("blip2-opt")[2].select(["language"]))
    t5_view = checks.stock_and_prepared("blip2-t5")[2]
    t5 = Counter(s.role for s in t5_view.select(["language"]))
    for role in ("layer", "attention", "q", "k", "v", "out", "fc1", "fc2"):
        assert (opt[role], t5[role]) == (2, 4)
    for role in ("mlp", "gate"):
        assert (opt[role], t5[role]) == (0, 4)
    assert (opt["cross_q"], t5["cross_q"]) == (0, 2)
    assert (opt["norm"], t5["norm"]) == (2 * 2 + 1, 2 * 2 + 2 * 3 + 2)
    crossed = t5_view.select(["language"], ["cross_v"])
    assert [(s.layer, s.path) for s in crossed] == [
        (2, "language_model.decoder.block.0.layer.1.EncDecAttention.v"),
        (3, "language_model.decoder.block.1.layer.1.EncDecAttention.v"),
    ]
    assert [s.layer for s in t5_view.select(["language"], ["q"], "last:2")] == [2, 3]


def test_t5_without_a_gate_has_one_inner_weight():
    view = backbone_of(mllms.blip2_t5("relu"))
    view.prepare()
    found = view.select(["language"], ["fc1"])
    assert [s.path.rpartition(".")[2] for s in found] == ["wi"] * 4
    with pytest.raises(SiteError, match="no site 'gate'"):
        view.select(["language"], ["gate"])


def test_cross_attention_is_listed_where_there_is_one():
    view = backbone_of(mllms.blip2_opt(num_hidden_layers=4, cross_attention_frequency=2))
    view.prepare()
    assert [s.layer for s in view.select(["fusion"], ["cross_q"])] == [0, 2]
    assert [s.layer for s in view.select(["fusion"], ["q"])] == [0, 1, 2, 3]


def test_unprepared_and_unknown_models_are_told():
    with pytest.raises(SiteError, match="prepare"):
        backbone_of(build("blip2-opt")).sites()
    model = mllms.blip2_opt()
    model.language_model = torch.nn.Linear(2, 2)
    view = backbone_of(model)
    view.prepare()
    with pytest.raises(SiteError, match="expected OPT, T5"):
        view.sites()


def test_pairs_are_refused_with_the_way_out():
    model = build("blip2-opt")
    view = backbone_of(model)
    for call in (
        lambda: view.embed_pairs(model, {}),
        lambda: view.encode_image(model, torch.zeros(1)),
        lambda: view.encode_text(model, torch.zeros(1)),
    ):
        with pytest.raises(TypeError, match=r"Blip2ForConditionalGeneration writes text.*CLIP"):
            call()


@BOTH
@pytest.mark.parametrize("method", ["lora", "aurora"])
@pytest.mark.parametrize("branch", ROLES)
def test_every_branch_is_adapted_disabled_and_merged(name, method, branch):
    checks.adapts_and_merges(name, method, branch, ROLES[branch])


@BOTH
def test_cached_decoding_equals_uncached_with_virtual_tokens(name):
    checks.caches_virtual_tokens(name, decoder=name == "blip2-t5")


@BOTH
def test_padding_does_not_reach_virtual_tokens(name):
    checks.padding_does_not_reach_virtual_tokens(name)


@BOTH
@pytest.mark.parametrize("at", [(0, 0, 0), (4, 4, 4), (0, 2, 99)])
@torch.no_grad()
def test_virtual_words_are_a_longer_prompt(name, at):
    _, model, view = checks.stock_and_prepared(name)
    trunk, batch = view.trunks()["language"], checks.inputs(name)
    extra = checks.tokens(trunk, 3)
    words = checks.received(model, trunk.module, batch)["inputs_embeds"]
    ones = torch.ones(3, 1, dtype=torch.long)
    mask = checks.spliced(batch["attention_mask"][..., None], ones, at)[..., 0]
    longer = {"inputs_embeds": checks.spliced(words, extra, at), "attention_mask": mask}
    kept, lm = checks.kept(words.shape[1], at), model.language_model
    if name == "blip2-opt":
        want = lm(**longer).logits[:, kept]
    else:
        read = lm.encoder(**longer).last_hidden_state[:, kept]
        want = lm(
            encoder_outputs=(read,),
            attention_mask=batch["attention_mask"],
            decoder_input_ids=batch["decoder_input_ids"],
        ).logits
    with inside(trunk, extra, at):
        found = model(**batch).logits
    if name == "blip2-opt":
        real = batch["attention_mask"].bool()
        found, want = found[real], want[real]
    assert checks.close(found, want)


@torch.no_grad()
def test_virtual_patches_pass_through_every_vision_layer():
    _, model, view = checks.stock_and_prepared("blip2-opt")
    trunk, pixels = view.trunks()["vision"], checks.inputs("blip2-opt")["pixel_values"]
    extra, at = checks.tokens(trunk, 3), (1, 1, 3)
    x = checks.spliced(model.vision_model.embeddings(pixels), extra, at)
    for layer in model.vision_model.encoder.layers:
        x = layer(x)
    want = model.vision_model.post_layernorm(x[:, checks.kept(5, at)])
    with inside(trunk, extra, at):
        assert checks.close(model.vision_model(pixels).last_hidden_state, want)


@torch.no_grad()
def test_virtual_queries_are_queries():
    """They enter behind the Q-Former's first norm: here as what that norm makes of more queries."""
    _, model, view = checks.stock_and_prepared("blip2-opt")
    trunk, pixels = view.trunks()["fusion"], checks.inputs("blip2-opt")["pixel_values"]
    more, queries = checks.tokens(trunk, 3), model.query_tokens.expand(3, -1, -1)
    image = model.vision_model(pixels).last_hidden_state
    seen = torch.ones(image.shape[:2], dtype=torch.long)
    seen[:, -1] = 0
    image_side = {"encoder_hidden_states": image, "encoder_attention_mask": seen}
    longer = torch.cat([more.expand(3, -1, -1), queries], dim=1)
    want = model.qformer(query_embeds=longer, **image_side).last_hidden_state[:, 3:]
    with inside(trunk, model.qformer.layernorm(more), (0, 0, 0)):
        found = model.qformer(query_embeds=queries, **image_side).last_hidden_state
        assert checks.close(found, want)
        assert model(**checks.inputs("blip2-opt")).logits.shape == (3, 10, 60)


def plain_attention(extra_k, extra_v):
    """softmax(q [k'; k]^T scale + masks) [v'; v], written out."""

    def attention(module, query, key, value, attention_mask, scaling, position_bias=None, **kwargs):
        p = extra_k.shape[2]
        key, value = torch.cat([extra_k, key], 2), torch.cat([extra_v, value], 2)
        scores = query @ key.transpose(2, 3) * scaling
        if position_bias is not None:
            scores = scores + F.pad(position_bias, (p, 0))
        if attention_mask is not None:
            wide = F.pad(attention_mask, (p, 0), value=True)
            scores = scores.masked_fill(~wide, float("-inf"))
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    return attention


@pytest.mark.parametrize(
    "path",
    [
        "language_model.encoder.block.1.layer.0.SelfAttention",
        "language_model.encoder.block.0.layer.0.SelfAttention",
        "language_model.decoder.block.0.layer.1.EncDecAttention",
        "qformer.encoder.layer.1.crossattention.attention",
        "qformer.encoder.layer.0.attention.attention",
        "vision_model.encoder.layers.0.self_attn",
    ],
)
@torch.no_grad()
def test_virtual_keys_join_those_of_the_stock_attention(path):
    _, model, view = checks.stock_and_prepared("blip2-t5")
    batch, module = checks.inputs("blip2-t5"), model.get_submodule(path)
    assert module in [s.module for s in view.select(None, ["attention", "cross_attention"])]
    shapes = []
    extend(module, lambda keys: shapes.append(keys.shape))
    plain = model(**batch).logits
    b, h, _, e = shapes[0]
    extra = 0.5 * torch.randn(2, b, h, 3, e, generator=torch.Generator().manual_seed(0))
    extend(module, lambda keys: (extra[0], extra[1]))
    found = model(**batch).logits
    assert not checks.close(found, plain)
    extend(module, None)
    assert torch.equal(model(**batch).logits, plain)
    # The same by another way: this one module calls an attention that knows the extra keys.
    AttentionInterface.register("written_out", plain_attention(*extra))
    stock = module.forward

    def forward(*args, **kwargs):
        before = module.config._attn_implementation
        module.config._attn_implementation = "written_out"
        try:
            return stock(*args, **kwargs)
        finally:
            module.config._attn_implementation = before

    module.forward = forward
    assert checks.close(model(**batch).logits, found)


@BOTH
def test_loaded_by_name(name, tmp_path):
    processor = BlipImageProcessor(size={"height": 32, "width": 32})
    loaded = checks.loads_by_name(name, tmp_path, processor)
    assert (loaded.image.size, loaded.image.resize) == (32, "squash")
    assert loaded.context_length == {"blip2-opt": 64, "blip2-t5": 512}[name]


@BOTH
def test_gradient_checkpointing_reaches_every_layer(name):
    _, _, view = checks.stock_and_prepared(name)
    layers = [s.module for s in view.select(None, ["layer"])]
    assert view.set_gradient_checkpointing()
    assert all(layer.gradient_checkpointing for layer in layers)
    view.set_gradient_checkpointing(False)
    assert not any(layer.gradient_checkpointing for layer in layers)
