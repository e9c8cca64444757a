"""UniPELT: its published share, its gates, and a forward written by hand."""

import peft
import pytest
import torch
import torch.nn.functional as F

from mmtune.backbones import SiteError, backbone_of
from mmtune.conformance.backbones import BACKBONES, Tower, build, images_and_texts, pair_embeddings
from mmtune.conformance.counts import unipelt_count
from mmtune.tuners.unipelt import GatedBottleneck, GatedLinear, Gates, UniPELTConfig, gate


def wrap(backbone="clip", **settings):
    model = build(backbone)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, UniPELTConfig(**settings))
    return wrapped.eval(), backbone_of(model)


def randomise(wrapped):
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.normal_(std=0.3, generator=g)


def test_share_of_bert_base_is_the_published_one():
    """1.28 % of 109.5 M: flat prefix 0.17, adapter 0.82, LoRA 0.27, three gates a layer 0.03.

    Source: arXiv 2110.07577: p = 10, m = 48, r = 8. The prefix is counted without the perceptron
    that it may be trained through, and q and v have one gate together (two would give 1.29).
    """
    bert, d, layers = 109_482_240, 768, 12
    parts = {
        "prefix": layers * 2 * 10 * d,
        "adapter": layers * (2 * d * 48 + 48 + d),
        "LoRA": layers * 2 * 8 * 2 * d,
        "gates": layers * 3 * (d + 1),
    }
    shares = {name: round(100 * n / bert, 2) for name, n in parts.items()}
    assert shares == {"prefix": 0.17, "adapter": 0.82, "LoRA": 0.27, "gates": 0.03}
    total = unipelt_count({"text": Tower(layers, d, 4 * d, norms=0)}, 10, 48, 8)
    assert total == sum(parts.values()) == 1_401_444
    assert round(100 * total / bert, 2) == 1.28


def test_gates_lie_between_zero_and_one_and_average_over_tokens():
    g = torch.Generator().manual_seed(0)
    x = 5 * torch.randn(3, 7, 4, generator=g)
    weight, bias = torch.randn(1, 4, generator=g), torch.randn(1, generator=g)
    found = gate(x, weight, bias)
    assert found.shape == (3, 1, 1)
    assert ((found > 0) & (found < 1)).all()
    by_hand = [sum(1 / (1 + (-(weight[0] @ t + bias)).exp()) for t in s) / 7 for s in x]
    assert torch.allclose(found.flatten(), torch.cat(by_hand), atol=1e-6)
    shuffled = x[:, torch.randperm(7, generator=g)]
    assert torch.allclose(gate(shuffled, weight, bias), found, atol=1e-6)


def test_gradients_of_a_gated_linear():
    layer = GatedLinear(torch.nn.Linear(4, 3), Gates())
    layer.add_adapter("default", rank=2, gated=True, generator=torch.Generator().manual_seed(0))
    layer.set_adapter("default")
    layer.double().base_layer.requires_grad_(False)
    names = [n for n, p in layer.named_parameters() if p.requires_grad and "prefix" not in n]
    assert len(names) == 4  # A, B, and the gate's weight and bias
    values = [torch.randn_like(layer.get_parameter(n)).requires_grad_() for n in names]
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def forward(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *values))


def test_gradients_of_a_gated_bottleneck():
    adapter = GatedBottleneck(4, 3, torch.Generator().manual_seed(0)).double()
    names, values = zip(*adapter.named_parameters(), strict=True)
    values = [torch.randn_like(v).requires_grad_() for v in values]
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def forward(x, *values):
        return torch.func.functional_call(adapter, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *values))


def sigmoid_mean(x, weight, bias):
    return (1 / (1 + (-(x @ weight.T + bias)).exp())).mean(1)[:, None]


def test_a_layer_is_the_written_formula():
    """A text layer of CLIP in float64, from the attention's softmax to the adapter's residual."""
    wrapped, view = wrap(branches=["text"], tokens=3, bottleneck=4, rank=2)
    randomise(wrapped)
    wrapped.double()
    layer = view.model.get_submodule("text_model.encoder.layers.1")
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    with torch.no_grad():
        found = layer(x, attention_mask=mask[None, None].expand(2, 1, 5, 5))
        n = layer.layer_norm1(x)
        attention, gates = layer.self_attn, layer.self_attn.q_proj.mmtune_gates["default"]
        g_lora = sigmoid_mean(n, gates["low_rank_weight"], gates["low_rank_bias"])
        g_prefix = sigmoid_mean(n, gates["prefix_weight"], gates["prefix_bias"])
        q, v = (
            m.base_layer(n)
            + g_lora
            * (n @ m.mmtune_low_rank["default"]["A"].T @ m.mmtune_low_rank["default"]["B"].T)
            for m in (attention.q_proj, attention.v_proj)
        )
        k = attention.k_proj(n)
        table = view.model.unipelt_prefixes.mmtune_keys["default"]["prefix__text__table"][:, 64:]
        y = torch.zeros_like(x)
        for b in range(2):
            for head in (slice(0, 16), slice(16, 32)):
                keys = torch.cat([g_prefix[b] * table[:, :32][:, head], k[b][:, head]])
                values = torch.cat([g_prefix[b] * table[:, 32:][:, head], v[b][:, head]])
                scores = q[b][:, head] @ keys.T / 4
                scores[:, 3:] = scores[:, 3:].masked_fill(~mask, -torch.inf)
                y[b][:, head] = scores.softmax(1) @ values
        h = x + attention.out_proj(y)
        z = layer.mlp.fc2.base_layer(layer.mlp.activation_fn(layer.mlp.fc1(layer.layer_norm2(h))))
        a = layer.mlp.fc2.mmtune_adapter["default"]
        squeezed = F.relu(z @ a.down.T + a.down_bias) @ a.up.T + a.up_bias
        want = h + z + sigmoid_mean(z, a.gate_weight, a.gate_bias) * squeezed
    assert torch.allclose(found, want, atol=1e-11)


@pytest.mark.parametrize("backbone", [b for b in BACKBONES if "clip" in b])
def test_a_sample_does_not_depend_on_its_neighbours(backbone):
    """The gates average over the tokens of one sample, whatever the layout of the tower."""
    wrapped, view = wrap(backbone, tokens=3, bottleneck=4, rank=2)
    randomise(wrapped)
    batch = images_and_texts(0, 3)
    with torch.no_grad():
        together = pair_embeddings(wrapped, view, batch)
        alone = pair_embeddings(wrapped, view, {k: x[:1] for k, x in batch.items()})
    assert torch.allclose(alone, together[[0, 3]], atol=1e-5)


def test_closed_gates_give_the_keys_of_a_zero_prefix_and_nothing_else():
    """With all gates at 0 adapter and LoRA vanish, and the prefix is p zero keys and values."""
    wrapped, view = wrap(tokens=3, bottleneck=4, rank=2)
    randomise(wrapped)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "weight" in name and "gate" in name:
                p.zero_()
            elif "bias" in name and "gate" in name:
                p.fill_(-1e4)
        closed = pair_embeddings(wrapped, view, images_and_texts(0, 3))
        for name, p in wrapped.named_parameters():
            if p.requires_grad and "gate" not in name:
                p.zero_()
        zeros = pair_embeddings(wrapped, view, images_and_texts(0, 3))
    assert torch.equal(closed, zeros)


def test_nothing_of_a_forward_pass_is_kept():
    wrapped, view = wrap(tokens=3, bottleneck=4, rank=2)
    pair_embeddings(wrapped, view, images_and_texts(0, 2))
    kept = [g for g in view.model.unipelt_prefixes.gates.values() if g.low_rank or g.prefix]
    assert kept == []


def test_decoders_are_left_out_and_refused_with_the_reason():
    wrapped, _ = wrap("llava", tokens=3, bottleneck=4, rank=2)
    assert all("vision_tower" in path for path in wrapped.peft_config["default"].adapted)
    with pytest.raises(SiteError, match="would see later ones: leave language out"):
        wrap("llava", branches=["vision", "language"])


@pytest.mark.parametrize("key", ["tokens", "bottleneck", "rank", "prefix_bottleneck"])
def test_settings_below_one_are_refused(key):
    with pytest.raises(ValueError, match=f"unipelt.{key} must be at least 1, got 0"):
        UniPELTConfig(**{key: 0})
