"""Adapters: where the bottleneck enters and leaves, and what it computes."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F

from mmtune.backbones import SiteError, backbone_of
from mmtune.conformance.backbones import BACKBONES, build
from mmtune.tuners.bottleneck import (
    AdaptedLinear,
    AdapterConfig,
    AdapterLayer,
    Bottleneck,
    TappedLinear,
    TrainedNorm,
)


def wrap(backbone, **settings):
    model = build(backbone)
    wrapped = peft.get_peft_model(model, AdapterConfig(**({"bottleneck": 4} | settings))).eval()
    return wrapped, model, backbone_of(model)


def randomise(model, seed=3):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.3, generator=g)


def outputs(model, view, backbone, size=3):
    return BACKBONES[backbone].outputs(model, view, BACKBONES[backbone].batch(0, size))


def of_kind(model, kind):
    return [m for m in model.modules() if isinstance(m, kind)]


def by_hand(adapted, source, activation=F.gelu, scale=1.0):
    """S (W_up act(W_down x + b_down) + b_up), written out."""
    w = adapted.mmtune_adapter["default"]
    hidden = activation(source @ w.down.T + w.down_bias)
    return scale * (hidden @ w.up.T + w.up_bias)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_pre_norm_layer_by_hand(parallel):
    """CLIP: x + f(norm x), twice; the adapter belongs to f, so it comes before the addition."""
    settings = {"parallel": parallel, "activation": "relu", "scale": 4.0}
    wrapped, model, _ = wrap("clip", branches=["vision"], **settings)
    randomise(wrapped)
    wrapped.double()
    layer = model.vision_model.encoder.layers[0]
    x = torch.randn(2, 5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = layer(x, attention_mask=None)
        with wrapped.disable_adapter():
            inner = layer.layer_norm1(x)
            y, _ = layer.self_attn(inner)
            h = x + y + by_hand(layer.self_attn.out_proj, inner if parallel else y, F.relu, 4)
            inner = layer.layer_norm2(h)
            y = layer.mlp(inner)
            want = h + y + by_hand(layer.mlp.fc2, inner if parallel else y, F.relu, 4)
    got = got[0] if isinstance(got, tuple) else got
    assert torch.allclose(got, want, atol=1e-12)
    assert not torch.allclose(got, x, atol=1)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_post_norm_layer_by_hand(parallel):
    """BLIP's text layer: norm(x + f(x)) three times, with its cross-attention."""
    settings = {"parallel": parallel, "branches": ["text", "fusion"]}
    wrapped, model, _ = wrap("blip-retrieval", **settings)
    randomise(wrapped)
    wrapped.double()
    layer = model.text_encoder.encoder.layer[0]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=g)
    image = torch.randn(2, 4, 48, dtype=torch.float64, generator=g)

    def sublayer(output, x, context):
        y = output.dense(context)
        return output.LayerNorm(x + y + by_hand(output.dense, x if parallel else y))

    with torch.no_grad():
        got = layer(x, encoder_hidden_states=image)
        with wrapped.disable_adapter():
            h = sublayer(layer.attention.output, x, layer.attention.self(x)[0])
            cross = layer.crossattention
            context = cross.self(h, encoder_hidden_states=image)[0]
            h = sublayer(cross.output, h, context)
            want = sublayer(layer.output, h, layer.intermediate(h))
    got = got[0] if isinstance(got, tuple) else got
    assert torch.allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_activation_and_gradient(activation):
    written = {
        "relu": lambda x: x.clamp(min=0),
        "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
        "silu": lambda x: x / (1 + (-x).exp()),
        "tanh": lambda x: 1 - 2 / ((2 * x).exp() + 1),
    }[activation]
    g = torch.Generator().manual_seed(0)
    bottleneck = Bottleneck(5, 7, 3, activation, scale=0.5, generator=g)
    randomise(bottleneck)
    bottleneck.double()
    x = torch.randn(4, 5, dtype=torch.float64, generator=g, requires_grad=True)
    hidden = written(x @ bottleneck.down.T + bottleneck.down_bias)
    want = 0.5 * (hidden @ bottleneck.up.T + bottleneck.up_bias)
    assert torch.allclose(bottleneck(x), want, atol=1e-12)
    assert torch.autograd.gradcheck(bottleneck, (x,))


@pytest.mark.parametrize("backbone", ["open_clip", "blip2-t5", "llava"])
def test_the_sublayers_input_is_forgotten(backbone):
    """A kept input would keep the graph of a whole forward pass alive."""
    wrapped, _, view = wrap(backbone, parallel=True)
    ends = of_kind(wrapped, AdaptedLinear)
    assert len(ends) == len(of_kind(wrapped, TappedLinear)) > 3
    wrapped.train()
    outputs(wrapped, view, backbone).sum().backward()
    assert all(end.handover.x is None for end in ends)
    with wrapped.disable_adapter(), torch.no_grad():
        outputs(wrapped, view, backbone)
    assert all(end.handover.x is None for end in ends)


def test_no_input_is_handed_over_twice():
    _, model, _ = wrap("clip", parallel=True)
    layer = model.vision_model.encoder.layers[0].mlp
    layer(torch.zeros(1, 2, 48))
    with pytest.raises(RuntimeError, match="first Linear was not called"):
        layer.fc2(torch.zeros(1, 2, 192))


def test_a_copy_hands_over_within_itself():
    wrapped, _, _ = wrap("clip", parallel=True)
    randomise(wrapped)
    batch = BACKBONES["clip"].batch(0, 3)
    twin = copy.deepcopy(wrapped)
    theirs = {id(end.handover) for end in of_kind(wrapped, AdaptedLinear)}
    assert not theirs & {id(end.handover) for end in of_kind(twin, AdaptedLinear)}
    with torch.no_grad():
        assert torch.equal(twin(**batch).image_embeds, wrapped(**batch).image_embeds)


@pytest.mark.parametrize("settings", [{"parallel": True}, {"train_norms": True}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_is_the_same_in_one_graph(settings, checkpointing):
    """But a checkpoint may not hand over inside a graph: there, the layers stay uncompiled."""
    whole = not (checkpointing and settings.get("parallel"))
    wrapped, model, view = wrap("clip", branches=["vision"], **settings)
    randomise(wrapped)
    wrapped.train()
    if checkpointing:
        view.set_gradient_checkpointing()
    x = BACKBONES["clip"].batch(0, 3)["pixel_values"]

    def run(tower):
        wrapped.zero_grad()
        y = tower(x).pooler_output
        y.pow(2).sum().backward()
        return y.detach(), [p.grad.clone() for p in wrapped.parameters() if p.requires_grad]

    want, grads = run(model.vision_model)
    torch._dynamo.reset()
    got, found = run(torch.compile(model.vision_model, backend="aot_eager", fullgraph=whole))
    assert torch.allclose(got, want, atol=1e-5)
    for a, b in zip(found, grads, strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def test_sequential_and_parallel_adapters_add_up():
    wrapped, model, _ = wrap("clip", branches=["text"], placement="mlp")
    wrapped.add_adapter(
        "beside",
        AdapterConfig(bottleneck=3, parallel=True, branches=["text"], placement="mlp"),
    )
    wrapped.base_model.set_adapter(["default", "beside"])
    randomise(wrapped)
    mlp = model.text_model.encoder.layers[1].mlp
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = mlp(x)
        with wrapped.disable_adapter():
            y = mlp(x)
        after, beside = (mlp.fc2.mmtune_adapter[name] for name in ("default", "beside"))
        assert torch.allclose(got, y + after(y) + beside(x), atol=1e-6)
    assert wrapped.get_nb_trainable_parameters()[0] == 2 * ((64 * 4 + 4 + 32) + (64 * 3 + 3 + 32))


def test_a_trained_norm_gets_the_gradient_of_its_weight_and_bias():
    wrapped, model, view = wrap("clip", train_norms=True)
    outputs(wrapped, view, "clip").pow(3).sum().backward()
    stock = build("clip")
    norms = {n: m for n, m in model.named_modules() if isinstance(m, TrainedNorm)}
    assert len(norms) == 11
    for name in norms:
        stock.get_submodule(name).requires_grad_()
    outputs(stock, backbone_of(stock), "clip").pow(3).sum().backward()
    for name, norm in norms.items():
        theirs = stock.get_submodule(name)
        for ours, other in ((norm.mmtune_weight, theirs.weight), (norm.mmtune_bias, theirs.bias)):
            assert torch.allclose(ours["default"].grad, other.grad, atol=1e-6, rtol=1e-4), name


def test_rms_norms_have_no_bias_to_train():
    _, model, view = wrap("llava", branches=["language"], train_norms=True)
    norms = of_kind(model.model.language_model, TrainedNorm)
    assert len(norms) == 5
    assert not any(len(norm.mmtune_bias) for norm in norms)
    assert all(norm.mmtune_weight["default"].shape == (32,) for norm in norms)
    with torch.no_grad():
        assert torch.equal(outputs(model, view, "llava"), _base_outputs("llava"))


def _base_outputs(backbone):
    model = build(backbone)
    view = backbone_of(model)
    view.prepare()
    return outputs(model, view, backbone)


def test_a_near_zero_start_is_cut_at_two_deviations():
    bottleneck = Bottleneck(300, 200, 100, init="near_zero", generator=torch.Generator())
    for weight in (bottleneck.down, bottleneck.up):
        assert weight.abs().max() <= 0.02
        assert weight.std().item() == pytest.approx(0.01 * 0.880, rel=0.02)  # of the cut normal
    assert not bottleneck.down_bias.any()
    assert not bottleneck.up_bias.any()
    wrapped, _, view = wrap("clip", init="near_zero")
    with torch.no_grad():
        fresh, base = outputs(wrapped, view, "clip"), _base_outputs("clip")
    assert 0 < (fresh - base).abs().max() < 1e-2


def test_seed_decides_the_start():
    starts = []
    for seed in (1, 1, 2):
        wrapped, _, _ = wrap("clip", seed=seed)
        layers = of_kind(wrapped, AdaptedLinear)
        starts.append([layer.mmtune_adapter["default"].down.detach() for layer in layers])
    assert all(torch.equal(a, b) for a, b in zip(starts[0], starts[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(starts[0], starts[2], strict=True))


@pytest.mark.parametrize(
    ("placement", "branches", "roles"),
    [
        ("attention", None, {"out", "cross_out"}),
        ("mlp", None, {"fc2"}),
        ("both", ["fusion"], {"cross_out"}),
        ("both", ["language"], {"out", "cross_out", "fc2"}),
    ],
)
def test_placement(placement, branches, roles):
    wrapped, model, view = wrap("blip-vqa", placement=placement, branches=branches)
    adapted = {n for n, m in model.named_modules() if isinstance(m, AdaptedLinear)}
    want = {
        s.path
        for s in view.sites()
        if s.role in roles and s.branch in (branches or [s.branch]) and s.layer is not None
    }
    assert adapted == want
    assert wrapped.peft_config["default"].adapted == [
        s.path for s in view.sites() if s.path in want
    ]


def test_a_branch_without_such_a_sublayer_is_refused_with_what_it_has():
    with pytest.raises(SiteError, match="no site 'fc2' on blip in fusion; it has cross_attention"):
        wrap("blip-retrieval", placement="mlp", branches=["fusion"])


def test_every_problem_is_named_at_once():
    with pytest.raises(ValueError, match="bottleneck") as caught:
        AdapterConfig(bottleneck=0, placement="mpl", activation="swish", init="one", scale=0)
    text = str(caught.value)
    for key in ("bottleneck", "placement", "activation", "init", "scale"):
        assert f"adapter.{key} must be" in text


def test_unloading_gives_the_stock_modules_back():
    wrapped, _, _ = wrap("clip", parallel=True, train_norms=True)
    assert of_kind(wrapped, AdapterLayer)
    stock = wrapped.unload()
    assert [(n, type(m)) for n, m in stock.named_modules()] == [
        (n, type(m)) for n, m in build("clip").named_modules()
    ]


def test_merging_is_refused_with_the_reason():
    wrapped, _, _ = wrap("clip")
    with pytest.raises(ValueError, match="ADAPTER cannot be merged: its bottlenecks are not lin"):
        wrapped.merge_adapter()


def test_adapter_on_top_of_lora_leaves_lora_as_it_was():
    """Two adapted models nested on one base."""
    from mmtune import lora_config

    model = build("clip")
    inner = peft.get_peft_model(model, lora_config(model, sites=["fc2"]))
    randomise(inner)
    view = backbone_of(model)
    with torch.no_grad():
        want = outputs(inner, view, "clip")
        outer = peft.get_peft_model(model, AdapterConfig(bottleneck=4)).eval()
        assert torch.equal(outputs(outer, view, "clip"), want)
        randomise(outer, seed=4)
        assert not torch.equal(outputs(outer, view, "clip"), want)
    wrapping = [e for e in of_kind(model, AdaptedLinear) if hasattr(e.base_layer, "lora_A")]
    assert len(wrapping) == 4
