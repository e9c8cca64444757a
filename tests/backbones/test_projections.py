"""Split attention computes what the stock modules compute, and gives them back exactly."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transformer import Attention
from torch import nn

from mmtune.backbones import projections
from mmtune.backbones.projections import ProjectionError, split


class Holder(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn


def holder(module, dtype=torch.float64):
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=0.2)
    return Holder(module.to(dtype).eval())


def masks(t, s, b, heads):
    torch.manual_seed(1)
    hidden = torch.rand(t, s) < 0.3
    hidden[:, 0] = False
    padding = torch.rand(b, s) < 0.3
    padding[:, 0] = False
    causal = torch.full((t, s), float("-inf")).triu(1)
    return {
        "none": {},
        "causal": {"attn_mask": causal},
        "bool": {"attn_mask": hidden},
        "per-head": {"attn_mask": hidden.expand(b * heads, t, s)},
        "padding": {"key_padding_mask": padding},
        "float-padding": {"key_padding_mask": torch.zeros(b, s).masked_fill(padding, -1e4)},
        "both": {
            "attn_mask": causal,
            "key_padding_mask": torch.zeros(b, s).masked_fill(padding, -1e4),
        },
    }


@pytest.mark.parametrize("kind", list(masks(1, 1, 1, 1)))
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_with_masks(kind, batch_first):
    h = holder(nn.MultiheadAttention(24, 3, batch_first=batch_first))
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    given_masks = {
        k: v if v.dtype == torch.bool else v.double() for k, v in masks(5, 5, 2, 3)[kind].items()
    }
    q = x if batch_first else x.transpose(0, 1)
    want, _ = h.attn(q, q, q, need_weights=False, **given_masks)
    split(h, "attn")
    found, weights = h.attn(q, q, q, need_weights=False, **given_masks)
    assert weights is None
    assert torch.allclose(found, want, atol=1e-12)


def test_cross_attention_with_own_key_and_value_widths():
    h = holder(nn.MultiheadAttention(24, 3, kdim=10, vdim=14, batch_first=True))
    before = copy.deepcopy(h.state_dict())
    q, k, v = (torch.randn(2, n, d, dtype=torch.float64) for n, d in ((4, 24), (6, 10), (6, 14)))
    want, _ = h.attn(q, k, v, need_weights=False)
    split(h, "attn")
    assert torch.allclose(h.attn(q, k, v, need_weights=False)[0], want, atol=1e-12)
    projections.restore(h)
    assert all(torch.equal(p, before[n]) for n, p in h.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [{}, {"qk_norm": True}, {"scale_heads": True, "inner_norm": True}, {"qkv_bias": False}],
)
def test_open_clip_attention(options):
    h = holder(Attention(24, 3, norm_layer=nn.LayerNorm, **options))
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    causal = torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1)
    want = [h.attn(x), h.attn(x, causal), h.attn(x, causal.isinf())]
    before = copy.deepcopy(h.state_dict())
    split(h, "attn")
    found = [h.attn(x), h.attn(x, causal), h.attn(x, causal.isinf())]
    for a, b in zip(found, want, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    projections.restore(h)
    assert list(h.state_dict()) == list(before)
    assert all(torch.equal(p, before[n]) for n, p in h.state_dict().items())


@given(
    heads=st.integers(1, 4),
    width=st.integers(1, 6),
    tokens=st.integers(1, 7),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None)
def test_split_and_restore_are_exact_for_any_size(heads, width, tokens, bias, seed):
    torch.manual_seed(seed)
    h = Holder(nn.MultiheadAttention(heads * width, heads, bias=bias, batch_first=True)).eval()
    x = torch.randn(2, tokens, heads * width)
    before = copy.deepcopy(h.state_dict())
    stock = h.attn
    want = stock(x, x, x, need_weights=False)[0]
    split(h, "attn")
    assert split(h, "attn") is h.attn
    assert torch.allclose(h.attn(x, x, x, need_weights=False)[0], want, atol=1e-5)
    assert projections.restore(h) == 1
    assert h.attn is stock
    assert list(h.state_dict()) == list(before)
    assert all(torch.equal(p, before[n]) for n, p in h.state_dict().items())
    assert torch.equal(h.attn(x, x, x, need_weights=False)[0], want)


def test_restored_module_has_the_trained_weights():
    h = holder(nn.MultiheadAttention(24, 3, batch_first=True))
    split(h, "attn")
    h.attn.k.weight.data += 1
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    want = h.attn(x, x, x, need_weights=False)[0]
    projections.restore(h)
    assert torch.allclose(h.attn(x, x, x, need_weights=False)[0], want, atol=1e-12)


def test_attention_dropout_is_real_in_training_only():
    h = holder(nn.MultiheadAttention(24, 3, dropout=0.5, batch_first=True))
    split(h, "attn")
    x = torch.randn(2, 5, 24, dtype=torch.float64)

    def run():
        return h.attn(x, x, x, need_weights=False)[0]

    assert torch.equal(run(), run())
    h.train()
    assert not torch.equal(run(), run())


def test_split_frees_the_fused_weight_and_keeps_dtype_and_frozenness():
    h = holder(nn.MultiheadAttention(24, 3, batch_first=True), torch.bfloat16)
    h.requires_grad_(False)
    stock = h.attn
    split(h, "attn")
    assert stock.in_proj_weight.is_meta
    assert {p.dtype for p in h.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in h.parameters())


def test_what_cannot_be_done_is_refused():
    x = torch.randn(2, 5, 24)
    with pytest.raises(ProjectionError, match="add_bias_kv"):
        split(Holder(nn.MultiheadAttention(24, 3, add_bias_kv=True)), "attn")
    with pytest.raises(ProjectionError, match="scaled cosine"):
        split(Holder(Attention(24, 3, scaled_cosine=True)), "attn")
    with pytest.raises(ProjectionError, match="GRU is no attention"):
        split(Holder(nn.GRU(24, 3)), "attn")
    h = Holder(nn.MultiheadAttention(24, 3, batch_first=True))
    split(h, "attn")
    with pytest.raises(ProjectionError, match="need_weights=False"):
        h.attn(x, x, x)
    with pytest.raises(ProjectionError, match="batch axis"):
        h.attn(x[0], x[0], x[0], need_weights=False)
    with pytest.raises(ProjectionError, match="needs attn_mask"):
        h.attn(x, x, x, need_weights=False, is_causal=True)
