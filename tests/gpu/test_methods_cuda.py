"""Every method on every backbone, in bf16 on a GPU: it trains, and the base comes back exactly."""

import pytest
import torch

from mmtune.backbones import backbone_of
from mmtune.conformance.backbones import BACKBONES, build
from mmtune.conformance.methods import METHODS, PAIRS
from mmtune.tuners import registry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FIRST_ROWS = [(m, b) for m, b in PAIRS if m == METHODS[m].method]


def outputs(model, view, backbone):
    inputs = {k: v.cuda() for k, v in BACKBONES[backbone].batch(0, 3).items()}
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    return BACKBONES[backbone].outputs(model, view, inputs)


@pytest.mark.parametrize(("method", "backbone"), FIRST_ROWS)
def test_trains_in_bf16_and_disabling_gives_the_base_bit_for_bit(method, backbone):
    case = METHODS[method]
    model = build(backbone).bfloat16().cuda()
    view = backbone_of(model)
    view.prepare()
    case.base(model)
    with torch.no_grad():
        base = outputs(model, view, backbone)
    options = registry.method(case.method).options(**case.settings)
    wrapped = registry.apply(model, case.method, options)
    assert {p.device.type for p in wrapped.parameters()} == {"cuda"}
    moving = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in wrapped.named_parameters()}
    target = torch.randn(base.shape, generator=torch.Generator().manual_seed(0)).cuda()
    optimizer = torch.optim.AdamW(moving.values(), lr=3e-3)
    losses = []
    wrapped.train()
    for _ in range(10):
        loss = (outputs(wrapped, view, backbone).float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    wrapped.eval()
    assert losses[-1] < losses[0]
    for name, parameter in wrapped.named_parameters():
        if case.idle and name.endswith(case.idle):
            continue
        assert torch.equal(parameter, before[name]) == (name not in moving), name
    with torch.no_grad(), wrapped.disable_adapter():
        assert torch.equal(outputs(wrapped, view, backbone), base)
