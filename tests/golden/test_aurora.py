"""Aurora on stock BLIP against the reference: outputs 1e-5, gradients 5e-5 (float32, CPU)."""

import json

import peft
import pytest
import torch
import transformers

from mmtune import AuroraConfig
from mmtune.backbones import backbone_of

from . import models
from .draws import FOLDER, D, Draws, relative_error
from .models import SITES, gate, modes_grad, places, set_modes


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


def check(draws, factors, *weighted):
    """Outputs with their weights and names; the loss is what they sum up to; its gradients."""
    for out, _, name in weighted:
        assert relative_error(out, draws.want(name)) < 1e-5, name
    loss = torch.stack([(out * w).sum() for out, w, _ in weighted]).sum()
    scale = sum(float((out.detach() * w).abs().sum()) for out, w, _ in weighted)
    assert abs(float(loss.detach()) - float(draws.want("loss"))) <= 1e-6 * scale
    loss.backward()
    check_factors(factors, draws)


def check_text_modes(model, draws, branches, layer=0, prefix=""):
    for branch in branches:
        part = {"text": "self", "fusion": "cross"}[branch]
        for role, linear in places(model, branch, layer).items():
            want = draws.want(f"grad_{prefix}{part}.p_{role[-1]}")
            assert relative_error(modes_grad(linear)[:, 0], want) < 5e-5, (layer, branch, role)


def check_gate(model, draws, layer=0, prefix=""):
    for name in models.GATES:
        found = getattr(gate(model, layer), name).grad
        assert relative_error(found, draws.want(f"grad_{prefix}{name}")) < 5e-5, (layer, name)


def additive(draws):
    """The mask of self-attention as a layer takes it, [b, 1, 1, t]."""
    return (1.0 - torch.from_numpy(draws.stored["mask"]).float())[:, None, None] * -10000


@pytest.fixture(params=["separate", "materialise", "auto"])
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
    model = models.blip()
    layer = model.vision_model.encoder.layers[0]
    models.fill(layer.self_attn, models.vision_attention(draws))
    roles = ["q", "k", "v", "out"]
    _, factors = models.adapt(model, draws, {"vision": roles}, compute=compute)
    found = [places(model, "vision", 0)[role] for role in roles]
    for place, column in zip(found, draws["P"].split(1, dim=1), strict=True):
        set_modes(place, column)
    out, _ = layer.self_attn(draws["x"])
    check(draws, factors, (out, draws["w"], "out"))
    assert relative_error(modes_grad(*found), draws.want("grad_P")) < 5e-5


def test_vision_mlp(compute):
    draws = Draws("vit_mlp")
    r = draws.number("R")
    draws.factors(r, diagonal=False)
    draws.vit_block_mlp("", r, "P")
    shape = (draws.number("B"), draws.number("N"), D)
    draws.draw("x", shape, 1)
    draws.draw("w", shape, 1)
    model = models.blip()
    mlp = model.vision_model.encoder.layers[0].mlp
    models.fill(mlp, models.vision_mlp(draws))
    _, factors = models.adapt(model, draws, {"vision": ["fc1", "fc2"]}, compute=compute)
    set_modes(mlp.fc1, draws["P"][:, :4])
    set_modes(mlp.fc2, draws["P"][:, 4:])
    check(draws, factors, (mlp(draws["x"]), draws["w"], "out"))
    assert relative_error(modes_grad(mlp.fc1, mlp.fc2), draws.want("grad_P")) < 5e-5


TEXT = {branch: SITES[branch] for branch in ("text", "fusion")}


@pytest.mark.parametrize("file", ["med_text_layer", "med_text_layer_cp"])
def test_text_layer(file, compute):
    """The layer has a gate, which does nothing in text mode."""
    draws = Draws(file)
    r = draws.number("R")
    draws.factors(r, diagonal=file.endswith("_cp"))
    draws.layer("", r, draws.number("ffn"), 0.05, cross=False)
    shape = (draws.number("B"), draws.number("T"), D)
    draws.draw("x", shape, 1)
    draws.draw("w", shape, 1)
    model = models.blip(draws.number("ffn"))
    layer = model.text_encoder.encoder.layer[0]
    models.fill(layer, models.text_layer(draws, cross=False), absent=("crossattention",))
    _, factors = models.adapt(model, draws, TEXT, compute=compute, gate="reference")
    models.set_text_layer(model, draws, cross=False)
    out = layer(draws["x"], attention_mask=additive(draws))
    check(draws, factors, (out, draws["w"], "out"))
    check_text_modes(model, draws, ["text"])
    assert all(p.grad is None for p in gate(model, 0).parameters())


def test_multimodal_layer(compute):
    draws = Draws("med_multimodal_layer")
    r = draws.number("R")
    draws.factors(r, diagonal=False)
    draws.layer("", r, draws.number("ffn"), 1, cross=True)
    b, n, t = (draws.number(x) for x in "BNT")
    draws.draw("x", (b, t, D), 1)
    draws.draw("enc", (b, n, D), 1)
    draws.draw("w", (b, t, D), 1)
    model = models.blip(draws.number("ffn"))
    layer = model.text_encoder.encoder.layer[0]
    models.fill(layer, models.text_layer(draws))
    _, factors = models.adapt(model, draws, TEXT, compute=compute, gate="reference")
    models.set_text_layer(model, draws)
    mask = additive(draws)
    # transformers does not hand a mask of the image down; padding at its end is cut off instead.
    lengths = draws.stored["enc_mask"].sum(1).tolist()
    assert sorted(lengths) == [n - 1, n]
    rows = [
        layer(draws["x"][i : i + 1], draws["enc"][i : i + 1, :length], mask[i : i + 1])
        for i, length in enumerate(lengths)
    ]
    check(draws, factors, (torch.cat(rows), draws["w"], "out"))
    check_text_modes(model, draws, ["text", "fusion"])
    check_gate(model, draws)
    with torch.no_grad():
        text = layer(draws["x"], attention_mask=mask)
    assert relative_error(text, draws.want("text_mode_out")) < 1e-5


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


# Role -> the part of a vision block, the first column of its modes, and how many are its own.
BLOCKS = {
    "q": ("attn", 0, 1),
    "k": ("attn", 1, 1),
    "v": ("attn", 2, 1),
    "out": ("attn", 3, 1),
    "fc1": ("mlp", 0, 4),
    "fc2": ("mlp", 4, 4),
}


def test_two_towers_share_factors(compute):
    draws = draw_towers()
    model = models.blip(draws.number("ffn"), layers=2)
    heads = ("vision_proj", "text_proj", "itm_head")
    models.fill(model, models.towers(draws, layers=2), absent=heads)
    wrapped, factors = models.adapt(model, draws, SITES, compute=compute, gate="reference")
    for i in range(2):
        for role, linear in places(model, "vision", i).items():
            part, at, blocks = BLOCKS[role]
            set_modes(linear, draws[f"vis.{i}.{part}_P"][:, at : at + blocks])
        models.set_text_layer(model, draws, i, f"txt.{i}.")
    ids, mask = (torch.from_numpy(draws.stored[name]) for name in ("ids", "mask"))
    image = model.vision_model(draws["image"]).last_hidden_state
    text = model.text_encoder(ids, attention_mask=mask).last_hidden_state
    both = model.text_encoder(ids, attention_mask=mask, encoder_hidden_states=image)
    check(
        draws,
        factors,
        (image, draws["w_image"], "image_out"),
        (text, draws["w_text"], "text_out"),
        (both.last_hidden_state, draws["w_multimodal"], "multimodal_out"),
    )
    for i in range(2):
        linears = places(model, "vision", i)
        found = modes_grad(*(linears[role] for role in ("q", "k", "v", "out")))
        assert relative_error(found, draws.want(f"grad_vis.{i}.attn_P")) < 5e-5
        found = modes_grad(linears["fc1"], linears["fc2"])
        assert relative_error(found, draws.want(f"grad_vis.{i}.mlp_P")) < 5e-5
        check_text_modes(model, draws, ["text", "fusion"], i, f"txt.{i}.")
        check_gate(model, draws, i, f"txt.{i}.")
    assert sum(p.requires_grad for p in wrapped.parameters()) == 3 + 2 * 6 + 2 * 6 + 2 * 4


RETRIEVAL, ANSWERING = "BlipForImageTextRetrieval", "BlipForQuestionAnswering"


@pytest.mark.parametrize("rank", [8, 32, 64, 128])
@pytest.mark.parametrize(("task", "kind"), [("retrieval", RETRIEVAL), ("vqa", ANSWERING)])
def test_counts_of_the_full_size_models(task, kind, rank):
    with torch.device("meta"):
        model = getattr(transformers, kind)(transformers.BlipConfig())
    backbone_of(model).prepare()
    retrieval = task == "retrieval"
    decoder = {} if retrieval else {"language": SITES["text"] + SITES["fusion"]}
    config = AuroraConfig(
        rank=rank,
        core="dense",
        block_layout="interleaved",
        sites=SITES | decoder,
        gate="reference",
        context="reference" if retrieval else "off",
        modules_to_save=["vision_proj", "itm_head"] if retrieval else None,
    )
    wrapped = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    starts = {
        "mode_factors.aurora_U": "U",
        "mode_factors.aurora_V": "V",
        "mode_factors.aurora_core": "core",
        "vision_model": "modes_vision",
        "text_encoder": "modes_text_encoder",
        "text_decoder": "modes_text_decoder",
        "mode_fusion_fusion": "gate_text_encoder",
        "mode_fusion_language": "gate_text_decoder",
        "vision_proj": "head_image_projection",
        "itm_head": "head_matching",
    }
    found = dict.fromkeys(starts.values(), 0)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.")
            (start,) = (start for start in starts if name.startswith(start))
            found[starts[start]] += parameter.numel()
    want = json.loads((FOLDER / "counts.json").read_text())[str(rank)][task]
    assert found | {"total": sum(found.values())} == want
    assert wrapped.get_nb_trainable_parameters()[0] == want["total"]
