"""Which parameters a region is, on every model."""

from __future__ import annotations

import pytest
import torch

from editing.regions import Region, parameters_of
from mmtune.backbones.base import SiteError
from tests.editing.tiny import MODELS, NEWER, PROBES, tiny

OPT = "language_model.model.decoder.layers"
T5 = "language_model"
LLAMA = "model.language_model.layers"
QFORMER = "qformer.encoder.layer"
DEFAULTS = {
    ("blip2-opt", "language"): [f"{OPT}.{i}.{fc}.weight" for i in (0, 1) for fc in ("fc1", "fc2")],
    ("blip2-t5", "language"): [  # the encoder's last layer and both of the decoder's
        f"{T5}.{layer}.DenseReluDense.{fc}.weight"
        for layer in (
            "encoder.block.1.layer.1",
            "decoder.block.0.layer.2",
            "decoder.block.1.layer.2",
        )
        for fc in ("wi_1", "wo")
    ],
    ("llava", "language"): [
        f"{LLAMA}.{i}.mlp.{fc}.weight" for i in (0, 1) for fc in ("up_proj", "down_proj")
    ],
    ("blip2-opt", "vision"): [f"{QFORMER}.{i}.output_query.dense.weight" for i in (0, 1)],
    ("blip2-t5", "vision"): [f"{QFORMER}.{i}.output_query.dense.weight" for i in (0, 1)],
    ("llava", "vision"): [f"model.multi_modal_projector.linear_{i}.weight" for i in (1, 2)],
    ("minigpt4", "language"): [
        f"language_model.model.layers.{i}.mlp.{fc}.weight"
        for i in (0, 1)
        for fc in ("up_proj", "down_proj")
    ],
    ("minigpt4", "vision"): [f"{QFORMER}.{i}.output_query.dense.weight" for i in (0, 1)],
    ("llava-onevision", "vision"): [
        f"model.multi_modal_projector.linear_{i}.weight" for i in (1, 2)
    ],
    ("qwen2.5-vl", "language"): [
        f"{LLAMA}.{i}.mlp.{fc}.weight" for i in (0, 1) for fc in ("up_proj", "down_proj")
    ],
    ("qwen2.5-vl", "vision"): [f"model.visual.merger.mlp.{i}.weight" for i in (0, 2)],
    ("qwen3-vl", "vision"): [  # the deepstack merger, then the last one
        f"model.visual.{merger}.linear_fc{i}.weight"
        for merger in ("deepstack_merger_list.0", "merger")
        for i in (1, 2)
    ],
}


@pytest.mark.parametrize(("name", "region"), DEFAULTS)
def test_defaults(name, region):
    mllm = tiny(name)
    found = parameters_of(mllm.backbone, region)
    assert list(found) == DEFAULTS[name, region]
    assert all(mllm.model.get_parameter(n) is p for n, p in found.items())


@pytest.mark.parametrize("name", [*MODELS, *NEWER])
def test_a_default_is_what_its_answers_depend_on(name):
    mllm = tiny(name)
    for region in ("vision", "language"):
        weights = {
            n: p.clone().requires_grad_() for n, p in parameters_of(mllm.backbone, region).items()
        }
        mllm.nll(mllm.batch(PROBES), weights).sum().backward()
        assert all(w.grad.abs().max() > 1e-6 for w in weights.values())


def test_places_of_ones_own():
    view = tiny("blip2-opt").backbone
    chosen = Region(("vision",), ("q", "fc2"), "last:1", biases=True)
    assert list(parameters_of(view, chosen)) == [
        f"vision_model.encoder.layers.1.{part}.{kind}"
        for part in ("self_attn.qkv.q", "mlp.fc2")
        for kind in ("weight", "bias")
    ]
    assert list(parameters_of(view, Region(("fusion",), layers=(-1,)))) == [
        f"qformer.encoder.layer.1.{part}_query.dense.weight" for part in ("intermediate", "output")
    ]
    # A layer holds all of its matrices and norms, each once, whatever else is named with it.
    layer = parameters_of(view, Region(("language",), ("layer", "fc1"), "last:1"))
    want = dict(view.model.language_model.model.decoder.layers[1].named_parameters())
    assert len(layer) == sum(not n.endswith("bias") for n in want)
    assert {id(p) for p in layer.values()} == {id(p) for n, p in want.items() if n[-4:] != "bias"}


def test_a_tied_weight_is_one_parameter():
    mllm = tiny("llava")
    mllm.model.lm_head.weight = mllm.model.get_input_embeddings().weight
    found = parameters_of(mllm.backbone, Region(("language",), ("embed", "head")))
    assert list(found) == ["model.language_model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (
            "text",
            r"no region 'text'; there are language, vision.*There are vision \(2 layers: embed",
        ),
        (Region(("fusion",)), "no branch 'fusion' on llava; it has vision, projector, language"),
        (Region(("language",), ("fc3",)), r"no site 'fc3' on llava in language; it has .*fc1"),
        (Region(("language",), ("fc1",), (7,)), r"no layer 7 in language: it has layers 0\.\.1"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(region, message):
    with pytest.raises(SiteError, match=message):
        parameters_of(tiny("llava").backbone, region)


def test_quantised_weights_are_refused():
    mllm = tiny("llava")
    layer = mllm.model.model.language_model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(SiteError, match=r"up_proj.weight is quantised \(torch.uint8\)"):
        parameters_of(mllm.backbone, "language")
