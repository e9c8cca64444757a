"""Aurora against the reference implementation: outputs 1e-5, gradients 5e-5 (float32, CPU)."""

import json

import peft
import pytest
import torch

from mmtune import AuroraConfig
from mmtune.tuners.aurora.factors import ModeFactors

from .draws import FOLDER, D, Draws, relative_error
from .models import TextLayer, TwoTowers, VitAttention, VitMlp

SITES = {
    "vision": ["q", "k", "v", "out", "fc1", "fc2"],
    "text": ["q", "k", "v"],
    "fusion": ["cross_q", "cross_k", "cross_v"],
}


def adapt(model, draws, branches, compute, sites=None):
    """Adapt `model` with the reference's settings and its drawn factors."""
    diagonal = "lam" in draws.drawn
    config = AuroraConfig(
        rank=draws.number("R"),
        core="diagonal" if diagonal else "dense",
        block_layout="plain" if diagonal else "interleaved",
        sites={b: (sites or SITES)[b] for b in branches},
        compute=compute,
    )
    wrapped = peft.get_peft_model(model, config)
    factors = next(m for m in model.modules() if isinstance(m, ModeFactors))
    groups = (factors.aurora_U, factors.aurora_V, factors.aurora_core)
    drawn = (draws["U"], draws["V"], draws["lam" if diagonal else "core"])
    for group, value in zip(groups, drawn, strict=True):
        assert list(group["default"]) == [f"{D}x{D}"]
        group["default"][f"{D}x{D}"].data = value.clone()
    return wrapped.eval(), factors


def set_modes(linear, values):
    """`values` [R, m]: one column a block."""
    assert linear.aurora_modes["default"].shape == values.T.shape
    linear.aurora_modes["default"].data = values.T.contiguous().clone()


def modes_grad(*linears):
    """[R, m] gradient of the mode vectors of several projections, in order."""
    return torch.cat([x.aurora_modes["default"].grad for x in linears]).T


def check_factors(factors, draws):
    key = f"{D}x{D}"
    u = factors.aurora_U["default"][key].grad
    v = factors.aurora_V["default"][key].grad
    core = factors.aurora_core["default"][key].grad
    found = {
        "U_slice": u[:8, :8],
        "U_fro": u.norm(),
        "U_ranksum": u.sum(1),
        "V_slice": v[:8, :8],
        "V_fro": v.norm(),
        "V_ranksum": v.sum(0),
    }
    if core.dim() == 1:
        found["lam"] = core
    else:
        found |= {
            "core_slice": core[:8, :8, :8],
            "core_fro": core.norm(),
            "core_sum2": core.sum(2),
        }
    for name, value in found.items():
        assert relative_error(value, draws.want(f"grad_{name}")) < 5e-5, name


def check_loss(loss, draws, *weighted):
    scale = sum(float((out.detach() * w).abs().sum()) for out, w in weighted)
    assert abs(float(loss.detach()) - float(draws.want("loss"))) <= 1e-6 * scale


@pytest.fixture(params=["separate", "materialise"])
def compute(request):
    return request.param


@pytest.mark.parametrize("file", ["vit_attention", "vit_attention_cp"])
def test_vision_attention(file, compute):
    draws = Draws(file)
    r = draws.number("R")
    draws.factors(r, diagonal=file.endswith("_cp"))
    draws.vit_block_attention("", r, "P")
    shape = (draws.number("B"), draws.number("N"), D)
    draws.draw("x", shape, 1)
    draws.draw("w", shape, 1)
    model = VitAttention(draws)
    wrapped, factors = adapt(model, draws, ["vision"], compute, {"vision": ["q", "k", "v", "out"]})
    places = (model.q, model.k, model.v, model.out)
    for place, column in zip(places, draws["P"].split(1, dim=1), strict=True):
        set_modes(place, column)
    out = wrapped(draws["x"])
    loss = (out * draws["w"]).sum()
    loss.backward()
    assert relative_error(out, draws.want("out")) < 1e-5
    check_loss(loss, draws, (out, draws["w"]))
    assert relative_error(modes_grad(*places), draws.want("grad_P")) < 5e-5
    check_factors(factors, draws)


def test_vision_mlp(compute):
    draws = Draws("vit_mlp")
    r = draws.number("R")
    draws.factors(r, diagonal=False)
    draws.vit_block_mlp("", r, "P")
    shape = (draws.number("B"), draws.number("N"), D)
    draws.draw("x", shape, 1)
    draws.draw("w", shape, 1)
    model = VitMlp(draws)
    wrapped, factors = adapt(model, draws, ["vision"], compute, {"vision": ["fc1", "fc2"]})
    set_modes(model.fc1, draws["P"][:, :4])
    set_modes(model.fc2, draws["P"][:, 4:])
    out = wrapped(draws["x"])
    loss = (out * draws["w"]).sum()
    loss.backward()
    assert relative_error(out, draws.want("out")) < 1e-5
    check_loss(loss, draws, (out, draws["w"]))
    assert relative_error(modes_grad(model.fc1, model.fc2), draws.want("grad_P")) < 5e-5
    check_factors(factors, draws)


@pytest.mark.parametrize("file", ["med_text_layer", "med_text_layer_cp"])
def test_text_layer(file, compute):
    draws = Draws(file)
    r = draws.number("R")
    draws.factors(r, diagonal=file.endswith("_cp"))
    draws.layer("", r, draws.number("ffn"), 0.05, cross=False)
    shape = (draws.number("B"), draws.number("T"), D)
    draws.draw("x", shape, 1)
    draws.draw("w", shape, 1)
    model = TextLayer(draws)
    wrapped, factors = adapt(model, draws, ["text"], compute)
    places = [getattr(model.attention, c) for c in "qkv"]
    for place, c in zip(places, "qkv", strict=True):
        set_modes(place, draws[f"self.p_{c}"][:, None])
    mask = (1.0 - torch.from_numpy(draws.stored["mask"]).float()) * -10000
    out = wrapped(draws["x"], mask)
    loss = (out * draws["w"]).sum()
    loss.backward()
    assert relative_error(out, draws.want("out")) < 1e-5
    check_loss(loss, draws, (out, draws["w"]))
    for place, c in zip(places, "qkv", strict=True):
        assert relative_error(modes_grad(place)[:, 0], draws.want(f"grad_self.p_{c}")) < 5e-5
    check_factors(factors, draws)


def draw_towers():
    draws = Draws("two_towers")
    r, ffn = draws.number("R"), draws.number("ffn")
    draws.factors(r, diagonal=False)
    draws.draw("vis.patch_w", (D, 3, 16, 16), 0.002)
    draws.draw("vis.patch_b", (D,), 0.01)
    draws.draw("vis.cls", (1, 1, D), 0.02)
    draws.draw("vis.pos", (1, 5, D), 0.02)
    for i in range(2):
        for part, block in (("ln1", draws.vit_block_attention), ("ln2", draws.vit_block_mlp)):
            draws.draw(f"vis.{i}.{part}_g", (D,), 0.1, 1)
            draws.draw(f"vis.{i}.{part}_b", (D,), 0.1)
            block(f"vis.{i}.", r, "attn_P" if part == "ln1" else "mlp_P")
    draws.draw("vis.ln_g", (D,), 0.1, 1)
    draws.draw("vis.ln_b", (D,), 0.1)
    draws.draw("txt.word", (40, D), 0.02)
    draws.draw("txt.pos", (16, D), 0.02)
    draws.draw("txt.emb_ln_g", (D,), 0.1, 1)
    draws.draw("txt.emb_ln_b", (D,), 0.1)
    for i in range(2):
        draws.layer(f"txt.{i}.", r, ffn, 1, cross=True)
    b, n, t = (draws.number(x) for x in "BNT")
    draws.draw("image", (b, 3, 32, 32), 1)
    draws.rs.randint(1, 40, size=(b, t))
    draws.draw("w_image", (b, n, D), 1)
    draws.draw("w_text", (b, t, D), 1)
    draws.draw("w_multimodal", (b, t, D), 1)
    return draws


def test_two_towers_share_factors(compute):
    draws = draw_towers()
    model = TwoTowers(draws)
    wrapped, factors = adapt(model, draws, ["vision", "text", "fusion"], compute)
    gates = ("scale_self", "shift_self", "scale_cross", "shift_cross")
    for i, block in enumerate(model.blocks):
        for j, role in enumerate(("q", "k", "v", "out")):
            set_modes(getattr(block.attention, role), draws[f"vis.{i}.attn_P"][:, j : j + 1])
        set_modes(block.mlp.fc1, draws[f"vis.{i}.mlp_P"][:, :4])
        set_modes(block.mlp.fc2, draws[f"vis.{i}.mlp_P"][:, 4:])
    for i, layer in enumerate(model.layers):
        for part, module in (("self", layer.attention), ("cross", layer.cross)):
            for c in "qkv":
                set_modes(getattr(module, c), draws[f"txt.{i}.{part}.p_{c}"][:, None])
        for name in gates:
            getattr(layer, name).requires_grad_(True)
    ids = torch.from_numpy(draws.stored["ids"])
    mask = (1.0 - torch.from_numpy(draws.stored["mask"]).float()) * -10000
    image = model.image(draws["image"])
    text = model.text(ids, mask)
    multimodal = model.text(ids, mask, image)
    weighted = [
        (image, draws["w_image"]),
        (text, draws["w_text"]),
        (multimodal, draws["w_multimodal"]),
    ]
    loss = torch.stack([(out * w).sum() for out, w in weighted]).sum()
    loss.backward()
    for name, out in (("image", image), ("text", text), ("multimodal", multimodal)):
        assert relative_error(out, draws.want(f"{name}_out")) < 1e-5, name
    check_loss(loss, draws, *weighted)
    check_factors(factors, draws)
    for i, block in enumerate(model.blocks):
        a = block.attention
        found = modes_grad(a.q, a.k, a.v, a.out)
        assert relative_error(found, draws.want(f"grad_vis.{i}.attn_P")) < 5e-5
        found = modes_grad(block.mlp.fc1, block.mlp.fc2)
        assert relative_error(found, draws.want(f"grad_vis.{i}.mlp_P")) < 5e-5
    for i, layer in enumerate(model.layers):
        for part, module in (("self", layer.attention), ("cross", layer.cross)):
            for c in "qkv":
                found = modes_grad(getattr(module, c))[:, 0]
                assert relative_error(found, draws.want(f"grad_txt.{i}.{part}.p_{c}")) < 5e-5
        for name in gates:
            found = getattr(layer, name).grad
            assert relative_error(found, draws.want(f"grad_txt.{i}.{name}")) < 5e-5
    assert sum(p.requires_grad for p in wrapped.parameters()) == 3 + 2 * 6 + 2 * 6 + 2 * 4


@pytest.mark.parametrize("rank", [8, 32, 64, 128])
def test_counts(rank):
    """The published split of trainable scalars, from two layers a tower scaled to twelve."""
    want = json.loads((FOLDER / "counts.json").read_text())[str(rank)]["retrieval"]
    with torch.device("meta"):
        model = MetaTowers()
    config = AuroraConfig(rank=rank, core="dense", block_layout="interleaved", sites=SITES)
    wrapped = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    factors = next(m for m in model.modules() if isinstance(m, ModeFactors))
    assert factors.aurora_U["default"][f"{D}x{D}"].numel() == want["U"]
    assert factors.aurora_V["default"][f"{D}x{D}"].numel() == want["V"]
    assert factors.aurora_core["default"][f"{D}x{D}"].numel() == want["core"]
    modes = [p for n, p in wrapped.named_parameters() if "aurora_modes" in n]
    vision = sum(p.numel() for p in modes[: 2 * 6])
    assert vision * 6 == want["modes_vision"]
    assert sum(p.numel() for p in modes[2 * 6 :]) * 6 == want["modes_text_encoder"]
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    shared = want["U"] + want["V"] + want["core"]
    assert trainable == shared + (want["modes_vision"] + want["modes_text_encoder"]) // 6


class MetaTowers(TwoTowers):
    """Two layers a tower without weights: counts scale with the layers."""

    def __init__(self) -> None:
        class Zeros:
            def __getitem__(self, name):
                stem = name.split(".")[-1].removesuffix("_w")
                if name.endswith("_w"):
                    shapes = {"qkv": (3 * D, D), "fc1": (4 * D, D), "fc2": (D, 4 * D)}
                    shapes |= {"patch": (D, 3, 16, 16), "ffn1": (96, D), "ffn2": (D, 96)}
                    return torch.zeros(shapes.get(stem, (D, D)))
                bias = {"qkv_b": 3 * D, "fc1_b": 4 * D, "ffn1_b": 96}
                return torch.zeros(bias.get(name.split(".")[-1], D))

        super().__init__(Zeros())
