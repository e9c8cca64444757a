"""Virtual keys and values: attention over them is softmax over all keys, computed by hand."""

import copy
import math

import pytest
import torch
from open_clip.transformer import Attention
from timm.layers.attention import Attention as TimmAttention
from torch import nn
from transformers import AttentionInterface
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.siglip.modeling_siglip import SiglipAttention

from mmtune.backbones import attention, backbone_of
from mmtune.backbones.attention import attend, extend
from mmtune.backbones.projections import split
from mmtune.conformance.backbones import CONTEXT, VOCABULARY, build

B, T, H, E, P = 2, 5, 3, 8, 4
D = H * E


def by_hand(q, k, v, extra, allowed=None, bias=None, scale=E**-0.5):
    """Softmax over virtual and own keys, in loops over heads; `allowed` [b, t, s] hides own keys.

    Shape: q [b, h, t, e], k and v [b, g, s, e] with h a multiple of g -> [b, h, t, e].
    """
    groups = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h // groups
            own = scale * q[b, h] @ k[b, g].T
            if bias is not None:
                own = own + bias[0, h]
            if allowed is not None:
                own = own.masked_fill(~allowed[b], -math.inf)
            virtual = scale * q[b, h] @ extra[0][b, g].T
            weights = torch.cat([virtual, own], 1).softmax(1)
            out[b, h] = weights @ torch.cat([extra[1][b, g], v[b, g]])
    return out


def draw(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def prefix(heads=H, seed=7):
    """One prefix for all samples, as an extension gives it."""
    k, v = draw(2, heads, P, E, seed=seed).unsqueeze(1).expand(2, B, -1, -1, -1)
    return k, v


def heads(x):
    return x.unflatten(-1, (H, E)).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).flatten(2)


def extended(module, extra):
    extend(module, lambda keys: extra)
    return module


class Holder(nn.Module):
    def __init__(self, attn):
        super().__init__()
        self.attn = attn
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(0.3 * draw(*p.shape, seed=i))


def split_module(stock):
    return split(Holder(stock.double().eval()), "attn")


CAUSAL = torch.ones(T, T, dtype=torch.bool).tril().expand(B, T, T)
PADDED = (torch.arange(T) < torch.tensor([[T], [3]]))[:, None].expand(B, T, T)


@pytest.mark.parametrize("kind", ["none", "causal", "padding", "both"])
def test_multihead_attention(kind):
    module = split_module(nn.MultiheadAttention(D, H, batch_first=True))
    x, extra = draw(B, T, D), prefix()
    masks, allowed = {}, None
    if kind in ("causal", "both"):
        masks["attn_mask"] = torch.full((T, T), -math.inf, dtype=torch.float64).triu(1)
        allowed = CAUSAL
    if kind in ("padding", "both"):
        masks["key_padding_mask"] = ~PADDED[:, 0]
        allowed = PADDED if allowed is None else PADDED & CAUSAL
    found = extended(module, extra)(x, x, x, need_weights=False, **masks)[0]
    want = by_hand(*(heads(p(x)) for p in (module.q, module.k, module.v)), extra, allowed)
    assert torch.allclose(found, module.out(joined(want)), atol=1e-12)


def test_open_clips_own_attention_puts_the_prefix_behind_its_key_norm():
    module = split_module(Attention(D, num_heads=H, qk_norm=True, scale_heads=True))
    # open_clip's own norms compute in float32.
    module.ln_q, module.ln_k = (Holder(nn.LayerNorm(E).double()).attn for _ in "qk")
    x, extra = draw(B, T, D), prefix()
    mask = torch.full((T, T), -math.inf, dtype=torch.float64).triu(1)
    found = extended(module, extra)(x, attn_mask=mask)
    q, k, v = (heads(p(x)) for p in (module.q, module.k, module.v))
    want = by_hand(module.ln_q(q), module.ln_k(k), v, extra, CAUSAL) * module.head_scale
    assert torch.allclose(found, module.out(joined(want)), atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_timms_attention(causal):
    module = split_module(TimmAttention(D, num_heads=H, qkv_bias=True))
    x, extra = draw(B, T, D), prefix()
    found = extended(module, extra)(x, is_causal=causal)
    want = by_hand(
        *(heads(p(x)) for p in (module.q, module.k, module.v)), extra, CAUSAL if causal else None
    )
    assert torch.allclose(found, module.out(joined(want)), atol=1e-12)


@pytest.mark.parametrize("cls", [CLIPAttention, SiglipAttention])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_transformers_attention(cls, mask):
    config = build("clip" if cls is CLIPAttention else "siglip").config.vision_config
    config.hidden_size, config.num_attention_heads = D, H
    config._attn_implementation = "sdpa"
    module = Holder(cls(config).double().eval()).attn
    x, extra, allowed = draw(B, T, D), prefix(), PADDED & CAUSAL
    given = {"none": None, "bool": allowed[:, None]}.get(mask)
    if mask == "float":
        given = torch.zeros(B, 1, T, T, dtype=torch.float64)
        given = given.masked_fill(~allowed[:, None], torch.finfo(torch.float64).min)
    found = extended(module, extra)(x, attention_mask=given)[0]
    projections = (module.q_proj, module.k_proj, module.v_proj)
    want = by_hand(*(heads(p(x)) for p in projections), extra, None if given is None else allowed)
    assert torch.allclose(found, module.out_proj(joined(want)), atol=1e-12)


class Stub(nn.Module):
    """What transformers' interface reads of an attention module."""

    def __init__(self, groups=1, is_causal=False):
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, is_causal


def through_interface(module, q, k, v, mask=None, **options):
    extend(build("clip").text_model.encoder.layers[0].self_attn, None)  # registers "mmtune"
    out, _ = AttentionInterface()[attention.IMPLEMENTATION](module, q, k, v, mask, **options)
    return out.transpose(1, 2)


@pytest.mark.parametrize("t", [T, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_grouped_query_attention_takes_a_prefix_for_each_key_head(t, masked):
    q, k, v, extra = draw(B, 4, t, E), draw(B, 2, T, E, seed=1), draw(B, 2, T, E, seed=2), prefix(2)
    module = Stub(groups=2)
    object.__setattr__(module, attention.EXTENSION, lambda keys: extra)
    allowed = PADDED[:, :t] if masked else None
    mask = allowed[:, None] if masked else None
    found = through_interface(module, q, k, v, mask, scaling=E**-0.5)
    assert torch.allclose(found, by_hand(q, k, v, extra, allowed), atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_one_query_behind_a_cache_sees_all_of_it(causal):
    q, k, v, extra = draw(B, H, 1, E), draw(B, H, T, E, seed=1), draw(B, H, T, E, seed=2), prefix()
    module = Stub(is_causal=causal)
    object.__setattr__(module, attention.EXTENSION, lambda keys: extra)
    found = through_interface(module, q, k, v, scaling=E**-0.5)
    assert torch.allclose(found, by_hand(q, k, v, extra), atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_position_bias_is_zero_on_the_prefix(causal, masked):
    q, k, v, extra = draw(B, H, T, E), draw(B, H, T, E, seed=1), draw(B, H, T, E, seed=2), prefix()
    bias, module = draw(1, H, T, T, seed=3), Stub(is_causal=causal)
    object.__setattr__(module, attention.EXTENSION, lambda keys: extra)
    allowed = PADDED if masked else CAUSAL if causal else None  # a mask stands for both
    mask = PADDED[:, None] if masked else None
    found = through_interface(module, q, k, v, mask, scaling=1.0, position_bias=bias)
    assert torch.allclose(found, by_hand(q, k, v, extra, allowed, bias, scale=1), atol=1e-12)


@pytest.mark.parametrize("s", [T, T + 2])
def test_causal_without_a_mask_means_what_it_means_without_a_prefix(s):
    """Torch aligns at the upper left: keys behind the last query are hidden from all."""
    q, k, v, extra = draw(B, H, T, E), draw(B, H, s, E, seed=1), draw(B, H, s, E, seed=2), prefix()
    allowed = torch.ones(T, s, dtype=torch.bool).tril().expand(B, T, s)
    bare = nn.Module()
    empty = (extra[0][:, :, :0], extra[1][:, :, :0])
    found = attend(bare, q, k, v, None, causal=True)
    assert torch.allclose(found, by_hand(q, k, v, empty, allowed), atol=1e-12)
    object.__setattr__(bare, attention.EXTENSION, lambda keys: extra)
    found = attend(bare, q, k, v, None, causal=True)
    assert torch.allclose(found, by_hand(q, k, v, extra, allowed), atol=1e-12)


def test_a_prefix_mixes_attention_over_it_with_attention_without_it():
    """(1 - g) Attn(q, K, V) + g Attn(q, P_K, P_V), g the prefix's share of the softmax's mass.

    Source: arXiv 2110.04366, section 3.1.
    """
    q, k, v, extra = draw(B, H, T, E), draw(B, H, T, E, seed=1), draw(B, H, T, E, seed=2), prefix()
    module = nn.Module()
    without = attend(module, q, k, v, None)
    over_prefix = attend(module, q, *extra, None)
    own = (q @ k.transpose(2, 3) * E**-0.5).exp().sum(-1, keepdim=True)
    virtual = (q @ extra[0].transpose(2, 3) * E**-0.5).exp().sum(-1, keepdim=True)
    share = virtual / (virtual + own)
    object.__setattr__(module, attention.EXTENSION, lambda keys: extra)
    found = attend(module, q, k, v, None)
    assert torch.allclose(found, (1 - share) * without + share * over_prefix, atol=1e-12)


@pytest.mark.parametrize("backbone", ["clip", "siglip", "open_clip", "blip2-t5", "llava"])
def test_without_extension_nothing_changes_bit_for_bit(backbone):
    from mmtune.conformance.backbones import BACKBONES

    case = BACKBONES[backbone]
    model = build(backbone)
    view = backbone_of(model)
    view.prepare()
    batch = case.batch(0, 2)
    with torch.no_grad():
        before = case.outputs(model, view, batch)
        modules = [s.module for s in view.sites() if s.role in ("attention", "cross_attention")]
        for module in modules:
            extend(module, lambda keys: None)
        assert torch.equal(case.outputs(model, view, batch), before)
        for module in modules:
            extend(module, None)
        assert torch.equal(case.outputs(model, view, batch), before)


def text_prefixes(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    for layer in model.text_model.encoder.layers:
        k, v = torch.randn(2, 1, 2, P, 16, generator=g)
        extend(
            layer.self_attn,
            lambda keys, k=k, v=v: (
                k.expand(len(keys), -1, -1, -1),
                v.expand(len(keys), -1, -1, -1),
            ),
        )


@pytest.mark.parametrize("backbone", ["clip", "siglip"])
def test_padding_stays_hidden_in_a_whole_text_tower(backbone):
    model = build(backbone)
    text_prefixes(model)
    ids = torch.randint(2, VOCABULARY - 1, (1, 6))
    padded = torch.cat([ids, torch.full((1, CONTEXT - 6), 0)], 1)
    mask = (torch.arange(CONTEXT) < 6).long()[None]
    with torch.no_grad():
        short = model.text_model(ids).last_hidden_state
        long = model.text_model(padded, attention_mask=mask).last_hidden_state[:, :6]
    assert torch.allclose(short, long, atol=1e-5)


def test_a_causal_tower_stays_causal():
    model = build("clip")
    text_prefixes(model)
    ids = torch.randint(2, VOCABULARY - 1, (1, 6))
    other = ids.clone()
    other[:, 4:] = (other[:, 4:] + 1) % (VOCABULARY - 2) + 1
    with torch.no_grad():
        a, b = (model.text_model(x).last_hidden_state for x in (ids, other))
    assert torch.equal(a[:, :4], b[:, :4])
    assert not torch.allclose(a[:, 4:], b[:, 4:])


def test_an_extension_is_not_registered_and_is_copied_with_its_module():
    module = split_module(nn.MultiheadAttention(D, H, batch_first=True))
    names = [n for n, _ in module.named_modules()]
    owner = nn.Linear(2, 2)
    extend(module, owner.forward)
    assert [n for n, _ in module.named_modules()] == names
    twin = copy.deepcopy(module)
    assert twin.kv_extension.__self__ is not owner
    assert torch.equal(twin.kv_extension.__self__.weight, owner.weight)


def test_modules_that_cannot_be_extended_are_refused():
    with pytest.raises(ValueError, match="neither a split attention"):
        extend(nn.MultiheadAttention(D, H), None)
    model = build("clip")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        extend(model.text_model.encoder.layers[0].self_attn, None)
