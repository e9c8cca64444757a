"""What only a GPU shows: bf16 against a float64 reference, and a base that never drifts."""

import pytest
import torch
from torch import nn

from mmtune.backbones import backbone_of
from mmtune.conformance.backbones import BACKBONES, build, images_and_texts
from mmtune.conformance.methods import METHODS
from mmtune.tuners import registry
from mmtune.tuners.aurora.config import AuroraConfig
from mmtune.tuners.aurora.factors import Blocks, ModeFactors
from mmtune.tuners.aurora.layer import AuroraLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("compute", ["separate", "materialise", "auto"])
@pytest.mark.parametrize("core", ["diagonal", "dense"])
@pytest.mark.parametrize(
    "blocks", [Blocks(768, 768), Blocks(768, 768, rows=4), Blocks(768, 768, columns=4)]
)
def test_bf16_agrees_with_float64(compute, core, blocks):
    torch.manual_seed(0)
    base = nn.Linear(blocks.columns * 768, blocks.rows * 768)
    factors = ModeFactors()
    factors.add_adapter("default")
    layer = AuroraLinear(base, factors)
    layer.add_adapter(
        "default", "768x768", blocks, 64, AuroraConfig(core=core, compute=compute), None
    )
    factors.aurora_V["default"]["768x768"].data.normal_(std=0.05)
    x = torch.randn(512, blocks.columns * 768)
    layer.double(), factors.double()
    reference = layer(x.double())
    layer.cuda(), factors.cuda()
    base.bfloat16()
    for p in (*factors.parameters(), layer.aurora_modes["default"]):
        p.data = p.data.float()
    found = layer(x.bfloat16().cuda()).double().cpu()
    assert (found - reference).norm() / reference.norm() < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sites", [["q", "k", "v", "out"], ["q", "k", "v", "out", "fc1", "fc2"]])
@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_gradients_under_autocast_are_those_of_the_separate_way(backbone, sites, dtype):
    """A base in float32 or bfloat16, float32 factors, forward under autocast."""
    found = {}
    for compute in ("separate", "materialise", "auto"):
        torch.manual_seed(0)
        model = build(backbone).to("cuda", dtype)
        view = backbone_of(model)
        settings = {"rank": 4, "seed": 1, "sites": sites, "gate": "off", "context": "off"}
        options = registry.method("aurora").options(compute=compute, **settings)
        wrapped = registry.apply(model, "aurora", options).train()
        trains = [p for p in wrapped.parameters() if p.requires_grad]
        for number, p in enumerate(trains):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
            p.data += 0.05 * noise.to(p)
        batch = {k: v.cuda() for k, v in BACKBONES[backbone].batch(0, 3).items()}
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
        with torch.autocast("cuda", torch.bfloat16):
            y = BACKBONES[backbone].outputs(wrapped, view, batch)
        (y.float() * torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y)).sum().backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trains]
        found[compute] = torch.cat([g.flatten() for g in gradients])
    wanted = found.pop("separate")
    assert wanted.norm() > 0
    for gradient in found.values():
        assert (gradient - wanted).norm() <= 0.1 * wanted.norm()


@pytest.mark.parametrize("backbone", ["clip", "siglip"])
@pytest.mark.parametrize("method", ["aurora", "aurora-mlp", "lora"])
def test_base_is_bit_identical_after_a_thousand_bf16_steps(method, backbone):
    model = build(backbone).bfloat16().cuda()
    view = backbone_of(model)
    view.prepare()
    case = METHODS[method]
    wrapped = registry.apply(
        model, case.method, registry.method(case.method).options(**case.settings)
    )
    frozen = {n: p.clone() for n, p in wrapped.named_parameters() if not p.requires_grad}
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    inputs = {k: v.cuda() for k, v in images_and_texts(0, 8).items()}
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad(), wrapped.disable_adapter():
        base = view.encode_image(model, inputs["pixel_values"])
    target = torch.arange(8, device="cuda")
    losses = []
    for _ in range(1000):
        pairs = view.embed_pairs(wrapped, inputs)
        loss = nn.functional.cross_entropy(10 * pairs.image.float() @ pairs.text.float().T, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert losses[-1] < losses[0]
    after = dict(wrapped.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in frozen.items())
    with torch.no_grad(), wrapped.disable_adapter():
        again = view.encode_image(wrapped, inputs["pixel_values"])
    assert torch.equal(again, base)
