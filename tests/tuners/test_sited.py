"""One more adapter on an adapted model: in fewer steps than PEFT's own, to the same end."""

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from mmtune.backbones import backbone_of
from mmtune.conformance.backbones import build
from mmtune.conformance.methods import METHODS
from mmtune.tuners import registry
from mmtune.tuners.bitfit import BitFitConfig
from mmtune.tuners.sited import SitedTuner

OWN = ("inject_adapter", "_cast_adapter_dtype", "_remap_adapter_state_dict_for_load")
# The first row of each of the toolkit's own methods, and what shares more, or less.
FIRST = {
    case.method: name
    for name, case in reversed(METHODS.items())
    if case.method not in ("lora", "adalora", "qlora") and "clip" in case.backbones
}
ROWS = [
    *((name, "clip") for name in reversed(FIRST.values())),
    ("aurora-per-layer", "clip"),
    ("aurora", "blip-vqa"),
    ("aurora-gate-reference", "blip-retrieval"),
]
every_row = pytest.mark.parametrize(("method", "backbone"), ROWS)


def config(method, model, **changes):
    case = METHODS[method]
    chosen = registry.method(case.method)
    made = chosen.build(model, chosen.options(**case.settings))
    for key, value in changes.items():
        setattr(made, key, value)
    return made


def adapted(method, backbone, dtype=torch.float32):
    """A model with an adapter on some branches, which holds random numbers as after training."""
    model = build(backbone).to(dtype)
    backbone_of(model).prepare()
    torch.manual_seed(0)
    branches = ["text"] if backbone == "clip" else ["text", "fusion"]
    return noisy(peft.get_peft_model(model, config(method, model, branches=branches), "first"))


def noisy(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += torch.randn(parameter.shape, generator=generator)
    return model


def both_ways(monkeypatch, make):
    """What `make` gives with the toolkit's own steps, and with those of PEFT."""
    quick = make()
    with monkeypatch.context() as patch:
        for name in OWN:
            patch.delattr(SitedTuner, name)
        return quick, make()


def assert_same(quick, generic):
    tensors = [[*w.named_parameters(), *w.named_buffers()] for w in (quick, generic)]
    for (name, tensor), (expected_name, expected) in zip(*tensors, strict=True):
        assert name == expected_name
        assert (tensor.dtype, tensor.requires_grad) == (expected.dtype, expected.requires_grad)
        assert torch.equal(tensor, expected), name
    layers = [[m for m in w.modules() if isinstance(m, BaseTunerLayer)] for w in (quick, generic)]
    for mine, its in zip(*layers, strict=True):
        assert type(mine) is type(its)
        assert list(mine.active_adapters) == list(its.active_adapters)
        assert mine.training == its.training
    assert list(quick.active_adapters) == list(generic.active_adapters)
    assert quick.base_model.targeted_module_names == generic.base_model.targeted_module_names
    assert quick.peft_config == generic.peft_config


@every_row
def test_a_fresh_adapter_beside_another_is_that_of_peft(monkeypatch, method, backbone):
    """On more places than the first one has; the same draws; what trained trains on."""

    def make():
        wrapped = adapted(method, backbone)
        parameters = list(wrapped.parameters())
        trained = next(p for p in parameters if p.requires_grad)
        stock = next(p for p in parameters if not p.requires_grad)
        trained.requires_grad, stock.requires_grad = False, True
        torch.manual_seed(2)
        wrapped.add_adapter("second", config(method, wrapped.get_base_model()))
        return wrapped, torch.get_rng_state()

    (quick, state), (generic, expected) = both_ways(monkeypatch, make)
    assert_same(quick, generic)
    assert torch.equal(state, expected)


@every_row
@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"is_trainable": True}),
        (torch.float32, {"low_cpu_mem_usage": True}),
        (torch.float32, {"autocast_adapter_dtype": False}),
    ],
    ids=["plain", "trainable", "meta", "as_saved"],
)
def test_a_loaded_adapter_is_that_of_peft(monkeypatch, tmp_path, method, backbone, dtype, how):
    folder = saved(method, backbone, tmp_path)
    if "autocast_adapter_dtype" in how or "low_cpu_mem_usage" in how:
        file = folder / "adapter_model.safetensors"
        save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file)

    def make():
        wrapped = adapted(method, backbone, dtype)
        return wrapped, wrapped.load_adapter(str(folder), "second", **how)

    (quick, found), (generic, expected) = both_ways(monkeypatch, make)
    assert_same(quick, generic)
    assert found.missing_keys == expected.missing_keys == []
    assert found.unexpected_keys == expected.unexpected_keys == []


def saved(method, backbone, folder):
    model = build(backbone)
    backbone_of(model).prepare()
    noisy(peft.get_peft_model(model, config(method, model))).save_pretrained(folder)
    return folder


def test_tensors_of_no_place_are_left_to_peft(monkeypatch, tmp_path):
    """One that the model lacks is reported, and the rest is loaded."""
    file = saved("aurora", "clip", tmp_path) / "adapter_model.safetensors"
    extra = {"base_model.model.nowhere.aurora_modes": torch.zeros(1, 4)}
    save_file(load_file(file) | extra, file)

    def make():
        wrapped = adapted("aurora", "clip")
        return wrapped, wrapped.load_adapter(str(tmp_path), "second")

    (quick, found), (generic, expected) = both_ways(monkeypatch, make)
    assert_same(quick, generic)
    assert found.unexpected_keys == expected.unexpected_keys == list(extra)


def test_an_adapter_beside_merged_ones_unmerges_them(tmp_path):
    folder = saved("bitfit", "clip", tmp_path)
    wrapped = adapted("bitfit", "clip")
    wrapped.merge_adapter()
    with pytest.warns(UserWarning, match="unmerged"):
        wrapped.load_adapter(str(folder), "second")
    assert not any(m.merged for m in wrapped.modules() if isinstance(m, BaseTunerLayer))


def test_one_that_brings_whole_modules_goes_peft_s_way():
    wrapped = adapted("bitfit", "clip")
    heads = BitFitConfig(modules_to_save=["visual_projection"])
    wrapped.add_adapter("second", heads)
    wrapped.set_adapter("second")
    training = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert any(n.endswith("visual_projection.modules_to_save.second.weight") for n in training)
    assert all(".second" in n for n in training)


def test_switching_visits_what_later_adapters_brought():
    """Layers that only the second adapter has obey a switch to it, and back."""
    wrapped = adapted("bitfit", "clip")
    wrapped.add_adapter("second", BitFitConfig())
    for name in ("second", "first"):
        wrapped.set_adapter(name)
        layers = [m for m in wrapped.modules() if isinstance(m, BaseTunerLayer)]
        assert all(m.active_adapters == [name] for m in layers)
        training = {n for n, p in wrapped.named_parameters() if p.requires_grad}
        assert training == {n for n, _ in wrapped.named_parameters() if n.endswith(f".{name}")}
