"""BitFit: trained biases and nothing else."""

import peft
import pytest
import torch
from torch import nn

from mmtune import merge
from mmtune.backbones import SiteError, backbone_of
from mmtune.conformance.backbones import BACKBONES, build
from mmtune.tuners.bitfit import BitFitConfig, ShiftedBias


def wrap(backbone, **settings):
    model = build(backbone)
    return peft.get_peft_model(model, BitFitConfig(**settings)).eval(), model, backbone_of(model)


def shifts(model):
    """Path in the stock model -> the shift of its bias."""
    return {
        name: module.mmtune_shift["default"]
        for name, module in model.named_modules()
        if isinstance(module, ShiftedBias)
    }


def loss_of(model, view, backbone):
    case = BACKBONES[backbone]
    return case.outputs(model, view, case.batch(0, 3)).pow(3).sum()


def test_a_vision_transformer_has_11_d_in_a_layer_and_its_outer_norms():
    wrapped, _, _ = wrap("open_clip", branches=["vision"])
    assert wrapped.get_nb_trainable_parameters()[0] == 2 * 11 * 48 + 2 * 48  # ln_pre, ln_post
    half, _, _ = wrap("open_clip", branches=["vision"], sites=["q", "fc1"])
    assert half.get_nb_trainable_parameters()[0] == 2 * 5 * 48


@pytest.mark.parametrize("backbone", ["clip", "blip-retrieval", "blip2-opt"])
def test_a_shift_gets_the_gradient_of_its_bias(backbone):
    """Training the stock model's own biases is the definition of BitFit."""
    wrapped, model, view = wrap(backbone)
    loss_of(wrapped, view, backbone).backward()
    stock = build(backbone)
    stock_view = backbone_of(stock)
    stock_view.prepare()
    biases = {name: stock.get_submodule(name).bias.requires_grad_() for name in shifts(model)}
    loss_of(stock, stock_view, backbone).backward()
    assert len(biases) > 20
    for name, shift in shifts(model).items():
        assert shift.grad.abs().sum() > 0
        assert torch.allclose(shift.grad, biases[name].grad, atol=1e-6, rtol=1e-4), name


def test_no_chosen_bias_is_forgotten():
    """In a layer of CLIP, all Linears and norms have one; the patch embedding has none."""
    _, model, _ = wrap("clip", branches=["vision"])
    every = {
        name.removesuffix(".bias").removesuffix(".base_layer")
        for name, _ in model.vision_model.named_parameters()
        if name.endswith(".bias")
    }
    assert {n.removeprefix("vision_model.") for n in shifts(model)} == every


def test_merging_adds_to_the_biases_and_touches_nothing_else():
    wrapped, model, _ = wrap("clip")
    with torch.no_grad():
        for shift in shifts(model).values():
            shift.copy_(torch.randn(shift.shape))
    added = {f"{name}.bias": shift.clone() for name, shift in shifts(model).items()}
    before, after = build("clip").state_dict(), merge(wrapped).state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        want = value + added[name] if name in added else value
        assert torch.equal(after[name], want), name


def test_nonfinite_shift_is_not_merged():
    wrapped, model, _ = wrap("clip", sites=["q"], layers=[0], branches=["text"])
    (shift,) = shifts(model).values()
    with torch.no_grad():
        shift[0] = float("inf")
    with pytest.raises(ValueError, match="non-finite biases"):
        wrapped.merge_adapter(safe_merge=True)
    layer = model.text_model.encoder.layers[0].self_attn.q_proj
    assert torch.equal(layer.bias, build("clip").text_model.encoder.layers[0].self_attn.q_proj.bias)
    assert not layer.merged


def test_shift_is_float32_and_the_output_keeps_the_dtype_of_the_model():
    model = build("clip").to(torch.bfloat16)
    wrapped = peft.get_peft_model(model, BitFitConfig(sites=["q"]))
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    layer = model.text_model.encoder.layers[0].self_attn.q_proj
    assert layer(torch.zeros(1, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_sites_without_bias_are_left_out_where_others_have_one():
    _, model, view = wrap("llava")
    language = [s.path for s in view.sites() if s.branch == "language"]
    assert shifts(model)
    assert not set(shifts(model)) & set(language)


def test_a_branch_that_is_asked_for_must_have_biases():
    with pytest.raises(SiteError, match="llava in language has one; branches with biases: vision"):
        wrap("llava", branches=["vision", "language"])


def test_bias_of_a_convolution_is_refused():
    with pytest.raises(SiteError, match=r"patch_embed.proj \(embed\) is a Conv2d"):
        wrap("open_clip-timm", sites=["embed"])


def test_head_can_be_chosen():
    """SigLIP's text head is a Linear with a bias; by default it belongs to the task."""
    _, model, _ = wrap("siglip", sites=["head"], branches=["text"])
    assert list(shifts(model)) == ["text_model.head"]
    assert isinstance(model.text_model.head.get_base_layer(), nn.Linear)
