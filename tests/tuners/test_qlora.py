"""QLoRA: what four bits hold, what is held in them, and what cannot be done with it."""

import re
from statistics import NormalDist

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mmtune import load_adapter, merge
from mmtune.backbones import backbone_of
from mmtune.backbones.nf4 import NF4Linear
from mmtune.backbones.projections import ProjectionError
from mmtune.checkpoints import TrainingError
from mmtune.config import TrainingOptions
from mmtune.conformance.backbones import BACKBONES, build
from mmtune.parameters import counts
from mmtune.training import train
from mmtune.tuners import qlora
from mmtune.tuners.qlora import qlora_config, quantise
from tests.fake_task import FakeTask, make_model

LINEARS = r"(attn\.(q|k|v|out)|self_attn\.[qkv]_proj|self_attn\.out_proj|mlp\.\w+)"


def adapted(backbone, **settings):
    model = build(backbone)
    torch.manual_seed(0)
    return peft.get_peft_model(model, qlora_config(model, **({"rank": 4} | settings))).eval()


def outputs(model, backbone):
    case = BACKBONES[backbone]
    with torch.no_grad():
        return case.outputs(model, backbone_of(model), case.batch(0, 3))


def trained(model, backbone, steps=3):
    """A few steps; each is followed by an evaluation, as in a run."""
    case, view = BACKBONES[backbone], backbone_of(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        model.train()
        case.outputs(model, view, case.batch(step, 3)).pow(3).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        outputs(model, backbone)
    return model


def quantised_in(model):
    return {n for n, m in model.named_modules() if isinstance(m, NF4Linear)}


def scales(layer):
    """Scale of each block, from the 8-bit ones and the scales of these (double quantisation)."""
    state = layer.weight.quant_state
    blocks = state.state2.code[state.absmax.long()].split(256)
    return torch.cat([b * s for b, s in zip(blocks, state.state2.absmax, strict=True)]) + (
        state.offset
    )


def test_the_sixteen_values_are_the_quantiles_of_the_paper():
    """QLoRA, appendix E: halves of 8 and 9 quantiles of N(0, 1) that share zero, in [-1, 1]."""
    offset = 1 - (1 / 32 + 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    above = [quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
    below = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
    values = torch.tensor(sorted([*above, 0.0, *below])) / max(above)
    code = NF4Linear(nn.Linear(64, 64), torch.float32).weight.quant_state.code
    torch.testing.assert_close(code, values, rtol=0, atol=1e-6)


def test_a_weight_takes_4_127_bits():
    layer = NF4Linear(nn.Linear(1024, 1024, bias=False), torch.bfloat16)
    state = layer.weight.quant_state
    held = (layer.weight, state.absmax, state.state2.absmax)
    bits = 8 * sum(t.numel() * t.element_size() for t in held) / 1024**2
    assert bits == 4 + 8 / 64 + 32 / (64 * 256)
    assert round(bits, 3) == 4.127
    rest = (state.code, state.state2.code, state.offset)  # once a layer, whatever its size
    assert sum(t.numel() for t in rest) == 16 + 256 + 1


@pytest.mark.parametrize("width", [96, 128], ids=["blocks-across-rows", "whole-blocks"])
def test_weights_are_held_as_the_nearest_value_times_the_scale_of_their_block(width):
    torch.manual_seed(0)
    linear = nn.Linear(width, 80)
    blocks = linear.weight.detach().reshape(-1, 64).clone()
    layer = NF4Linear(linear, torch.float32)
    code = layer.weight.quant_state.code
    packed = layer.weight.detach().view(torch.uint8).flatten().long()
    indices = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    distance = (blocks[..., None] / largest[..., None] - code).abs()
    chosen = distance.gather(2, indices[..., None])[..., 0]
    torch.testing.assert_close(chosen, distance.amin(2), rtol=0, atol=1e-6)
    scale = scales(layer)[:, None]
    # The 8-bit scale is off by at most half a step of its own code, near 1 % of the largest.
    assert (scale - largest).abs().max() < 0.01 * largest.max()
    held = code[indices] * scale
    for eye in (torch.eye(width), torch.eye(width, requires_grad=True)):
        found = layer(eye) - layer.bias
        torch.testing.assert_close(found, held.reshape(80, width).T, rtol=1e-5, atol=1e-6)
    half_gap = (code[1:] - code[:-1]).max() / 2
    bound = half_gap * largest + (scale - largest).abs() + 1e-6
    assert ((held - blocks).abs() <= bound).all()


@pytest.mark.parametrize("backbone", ["open_clip", "open_clip-fused", "open_clip-timm", "clip"])
def test_every_linear_of_the_layers_is_quantised_and_nothing_else(backbone):
    model = build(backbone)
    backbone_of(model).prepare()
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    in_layers = {n for n in linears if re.search(r"\.\d+\.(.+\.)?" + LINEARS + "$", n)}
    assert len(in_layers) == 2 * 2 * 6
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    before = counts(model)
    assert set(quantise(model)) == in_layers == quantised_in(model)
    assert counts(model) == before
    for name, parameter in model.named_parameters():
        path, _, kind = name.rpartition(".")
        if path not in in_layers or kind == "bias":
            assert torch.equal(parameter, kept[name])
    assert quantise(model) == []


def test_only_the_chosen_branches_are_quantised_all_sites_of_them():
    wrapped = adapted("open_clip", branches=["text"], sites=["q"])
    paths = quantised_in(wrapped.get_base_model())
    assert len(paths) == 12
    assert not any("visual" in path for path in paths)
    assert sum(path.endswith(".base_layer") for path in paths) == 2  # q of two layers


@pytest.mark.parametrize("backbone", ["open_clip", "clip"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_training_and_evaluation_leave_the_base_bit_identical(backbone, dtype):
    """bitsandbytes' own layer rounds biases in training and repacks weights in evaluation."""
    wrapped = adapted(backbone, compute_dtype=dtype)
    state = wrapped.get_base_model().state_dict()
    before = {n: t.clone() for n, t in state.items() if "lora_" not in n}
    trained(wrapped, backbone)
    after = wrapped.get_base_model().state_dict()
    assert any("quant_state" in n for n in before)
    assert all(torch.equal(after[n], t) for n, t in before.items())


def test_bias_is_added_in_the_compute_dtype_but_kept_in_its_own():
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    bias = linear.bias.detach().clone()
    layer, x = NF4Linear(linear, torch.bfloat16), torch.randn(5, 64)
    y = layer(x)
    assert y.dtype == torch.float32
    assert torch.equal(layer.bias, bias)
    exact = NF4Linear(linear, torch.float32)(x)
    assert 0 < (y - exact).abs().max() < 0.02 * exact.abs().max()


def test_merging_is_refused_and_the_way_it_names_works(tmp_path):
    wrapped = trained(adapted("open_clip"), "open_clip")
    wrapped.save_pretrained(tmp_path)
    for attempt in (wrapped.merge_adapter, wrapped.merge_and_unload, lambda: merge(wrapped)):
        with pytest.raises(ValueError, match=r"QLORA cannot be merged.*quantise=False"):
            attempt()
    merged = merge(load_adapter(build("open_clip"), tmp_path, quantise=False))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    path = "base_model.model.transformer.resblocks.1.mlp.c_fc"
    a, b = (saved[f"{path}.lora_{letter}.weight"] for letter in "AB")
    want = build("open_clip").transformer.resblocks[1].mlp.c_fc.weight + 16 / 4 * b @ a
    torch.testing.assert_close(merged.transformer.resblocks[1].mlp.c_fc.weight, want)
    build("open_clip").load_state_dict(merged.state_dict())  # the stock layout, every tensor


def test_field_that_the_adapter_does_not_have_is_refused(tmp_path):
    adapted("clip").save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"QLORA adapter has no field 'quantize'"):
        load_adapter(build("clip"), tmp_path, quantize=False)


@pytest.mark.parametrize("backbone", ["open_clip", "open_clip-fused", "open_clip-timm"])
def test_stock_layout_of_a_quantised_model_is_refused(backbone):
    model = build(backbone)
    quantise(model)
    before = outputs(model, backbone)
    with pytest.raises(ProjectionError, match=r"quantised.*load the model again"):
        backbone_of(model).restore()
    assert torch.equal(outputs(model, backbone), before)


def test_file_holds_lora_alone_and_says_how_the_base_was_held(tmp_path):
    wrapped = adapted("clip", branches=["text"], compute_dtype="float32")
    wrapped.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(n.endswith((".lora_A.weight", ".lora_B.weight")) for n in saved)
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert (config.peft_type, config.branches, config.compute_dtype, config.quantise) == (
        "QLORA",
        ["text"],
        "float32",
        True,
    )
    again = peft.PeftModel.from_pretrained(build("clip"), str(tmp_path))
    assert quantised_in(again) == quantised_in(wrapped)


def test_missing_bitsandbytes_is_named_before_anything_is_replaced(monkeypatch):
    monkeypatch.setattr(qlora, "find_spec", lambda name: None)
    model = build("clip")
    with pytest.raises(ImportError, match=r"pip install mmtune\[qlora\]"):
        qlora_config(model)
    with pytest.raises(ImportError, match=r"pip install mmtune\[qlora\]"):
        quantise(model)
    assert quantised_in(model) == set()


def test_paged_optimiser_on_the_cpu_is_refused(tmp_path):
    options = TrainingOptions(optimizer="paged_adamw", device="cpu", batch_size=4)
    task = FakeTask()
    with pytest.raises(TrainingError, match=r"needs a CUDA device.*training\.optimizer: adamw"):
        train(make_model(), task, options, tmp_path, progress=False)
    assert task.losses == 0
