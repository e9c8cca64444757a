"""Aurora's pooled contexts, its trained heads, and what shares its factors."""

import peft
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from mmtune import AuroraConfig, load_adapter, merge
from mmtune.backbones import backbone_of
from mmtune.conformance.backbones import build
from mmtune.parameters import parameter_groups
from mmtune.tuners.aurora import PooledContext, context_of
from mmtune.tuners.aurora.layer import AuroraLinear

from ..backbones.blip_checks import close, outputs

NAME = "blip-retrieval"
HEADS = ["vision_proj", "itm_head"]


def adapted(**settings):
    model = build(NAME)
    view = backbone_of(model)
    view.prepare()
    return peft.get_peft_model(model, AuroraConfig(**({"rank": 2} | settings))), view


def filled(wrapped, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return wrapped.eval()


def test_reference_context_is_a_tenth_of_the_mean_text():
    context = PooledContext("reference")
    fused, text = torch.randn(5, 4), torch.randn(3, 4)
    assert context.positives_only
    assert not list(context.parameters())
    mean = (text[0] + text[1] + text[2]) / 3
    assert torch.allclose(context.enhance(fused, text), fused + 0.1 * mean, atol=1e-6)


def test_batch_context_attends_to_the_texts_and_starts_at_nothing():
    context = PooledContext("batch")
    fused, text = torch.randn(5, 4), torch.randn(3, 4)
    assert not context.positives_only
    assert torch.equal(context.enhance(fused, text), fused)
    context.alpha.data.fill_(0.5)
    found = context.enhance(fused, text)
    for i in range(5):
        weights = torch.stack([(fused[i] @ t / 2).exp() for t in text])
        mixed = sum(w * t for w, t in zip(weights / weights.sum(), text, strict=True))
        assert torch.allclose(found[i], fused[i] + 0.5 * mixed, atol=1e-6)


@pytest.mark.parametrize("kind", ["batch", "reference"])
def test_gradients_in_float64(kind):
    context = PooledContext(kind).double()
    for p in context.parameters():
        p.data.fill_(0.5)
    fused, text = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 3))
    inputs = [fused, text, *context.parameters()]
    assert gradcheck(lambda fused, text, *_: context.enhance(fused, text), inputs)


@pytest.mark.parametrize("kind", ["batch", "reference"])
def test_context_is_found_in_wrappers_while_its_adapter_acts(kind):
    wrapped, view = adapted(context=kind)
    assert context_of(view.model) is context_of(wrapped) is context_of(nn.Sequential(wrapped))
    assert context_of(wrapped).positives_only == (kind == "reference")
    with wrapped.disable_adapter():
        assert context_of(wrapped) is None
    wrapped.add_adapter("plain", AuroraConfig(rank=2))
    wrapped.set_adapter("plain")
    assert context_of(wrapped) is None
    wrapped.set_adapter("default")
    assert context_of(wrapped) is not None
    wrapped.delete_adapter("default")
    assert context_of(wrapped) is None


def test_no_context_where_none_was_asked_for():
    assert context_of(build(NAME)) is None
    assert context_of(adapted()[0]) is None
    assert context_of(peft.get_peft_model(build("clip"), AuroraConfig(rank=2))) is None


@pytest.mark.parametrize("gate", ["off", "tanh"])
@pytest.mark.parametrize(("kind", "numbers"), [("batch", 1), ("reference", 0)])
def test_pooled_context_has_its_numbers_and_changes_no_forward_pass(kind, numbers, gate):
    plain, view = adapted(context="off", gate=gate, seed=0)
    pooled, other = adapted(context=kind, gate=gate, seed=0)
    count = plain.get_nb_trainable_parameters()[0]
    assert pooled.get_nb_trainable_parameters()[0] == count + numbers
    assert torch.equal(outputs(plain, view, NAME), outputs(pooled, other, NAME))
    pooled.train()
    assert torch.equal(outputs(plain, view, NAME), outputs(pooled, other, NAME))


def test_pooled_context_is_saved_and_takes_gradients(tmp_path):
    wrapped, _ = adapted(context="batch", gate="off")
    context = context_of(wrapped)
    context.enhance(torch.randn(2, 32), torch.randn(3, 32)).sum().backward()
    assert context.alpha.grad.abs().sum() > 0
    context.alpha.data.fill_(0.25)
    wrapped.save_pretrained(tmp_path)
    assert context_of(load_adapter(build(NAME), tmp_path)).alpha.item() == 0.25
    # In evaluation it does nothing, so the rest can be folded into the weights.
    filled(wrapped)
    want = outputs(wrapped, backbone_of(wrapped.get_base_model()), NAME)
    stock = build(NAME)
    stock.load_state_dict(merge(wrapped).state_dict())
    assert close(outputs(stock, backbone_of(stock), NAME), want)


@torch.no_grad()
def test_heads_trained_whole_are_counted_saved_loaded_and_switched(tmp_path):
    plain, _ = adapted()
    wrapped, view = adapted(modules_to_save=HEADS)
    base = outputs(wrapped, view, NAME)
    sizes = sum(p.numel() for name in HEADS for p in build(NAME).get_submodule(name).parameters())
    counts = [m.get_nb_trainable_parameters()[0] for m in (plain, wrapped)]
    assert counts[1] - counts[0] == sizes == 48 * 24 + 24 + 32 * 2 + 2
    first = outputs(filled(wrapped), view, NAME)
    wrapped.add_adapter("second", AuroraConfig(rank=2, modules_to_save=HEADS))
    wrapped.set_adapter("second")
    assert wrapped.get_nb_trainable_parameters()[0] == counts[1]
    assert torch.equal(outputs(wrapped, view, NAME), base)
    second = outputs(filled(wrapped, seed=1), view, NAME)
    wrapped.set_adapter("default")
    assert torch.equal(outputs(wrapped, view, NAME), first)
    assert not torch.equal(first, second)
    with wrapped.disable_adapter():
        assert torch.equal(outputs(wrapped, view, NAME), base)
    wrapped.save_pretrained(tmp_path)
    for model in (load_adapter(build(NAME), tmp_path), from_pretrained(build(NAME), tmp_path)):
        stock = backbone_of(model.get_base_model())
        assert torch.equal(outputs(model.eval(), stock, NAME), first)
    wrapped.delete_adapter("second")
    assert torch.equal(outputs(wrapped, view, NAME), first)


def from_pretrained(model, folder):
    backbone_of(model).prepare()
    return peft.PeftModel.from_pretrained(model, str(folder))


@torch.no_grad()
def test_trained_heads_are_merged():
    wrapped, view = adapted(modules_to_save=HEADS, gate="off", context="off")
    want = outputs(filled(wrapped), view, NAME)
    stock = build(NAME)
    stock.load_state_dict(merge(wrapped).state_dict())
    assert close(outputs(stock, backbone_of(stock), NAME), want)


SITES = {"vision": ["q", "k"], "text": ["q", "k", "v", "fc1"], "fusion": ["cross_q", "cross_k"]}


@pytest.mark.parametrize(
    ("sharing", "keys"),
    [
        ("all", {"48x48", "32x32", "32x48"}),
        ("branch", {"vision_48x48", "text_32x32", "fusion_32x32", "fusion_32x48"}),
        (
            "layer",
            {
                f"{branch}_{layer}_{shape}"
                for branch, shape in (
                    ("vision", "48x48"),
                    ("text", "32x32"),
                    ("fusion", "32x32"),
                    ("fusion", "32x48"),
                )
                for layer in (0, 1)
            },
        ),
    ],
)
def test_sharing_groups_the_factors(sharing, keys):
    wrapped, view = adapted(
        sharing=sharing, sites=SITES, gate="off", context="off", branch_ranks={"text": 1}
    )
    factors = view.model.get_submodule("mode_factors")
    assert set(factors.aurora_U["default"]) == keys
    # A branch with factors of its own has no more components of them than it uses.
    ranks = {k: len(factors.aurora_U["default"][k]) for k in keys}
    assert ranks == {k: 1 if k.startswith("text") else 2 for k in keys}
    numbers = sum(r * (int(a) + int(b)) + r for k, r in ranks.items() for a, b in [shape(k)])
    modes = 2 * (2 * 2 + 7 * 1 + 2 * 2)  # layers x (vision, text with fc1 in four, fusion)
    assert wrapped.get_nb_trainable_parameters()[0] == numbers + modes


def test_factors_of_layers_are_listed_together():
    wrapped, view = adapted(sharing="layer", sites=["q"], gate="tanh", context="off")
    groups = {group.role: group for group in parameter_groups(wrapped, view.sites())}
    factors = groups["mode_factors.aurora_U.default.text_*_32x32"]
    assert (factors.branch, factors.tensors, factors.count) == ("shared", 2, 2 * 2 * 32)
    gates = groups["mode_fusion_fusion_*.aurora_gate.default.beta"]
    assert (gates.tensors, gates.count) == (2, 2 * 32)


def shape(key):
    return key.rpartition("_")[2].split("x")


@pytest.mark.parametrize(
    ("sharing", "key", "moved"),
    [("all", "32x32", 2 * 4), ("branch", "text_32x32", 2 * 3), ("layer", "text_1_32x32", 3)],
)
@torch.no_grad()
def test_a_shared_factor_moves_those_that_share_it(sharing, key, moved):
    wrapped, view = adapted(
        sharing=sharing,
        sites={"vision": ["q"], "text": ["q", "k", "v"], "fusion": ["cross_q", "cross_k"]},
    )
    filled(wrapped)
    linears = [m for m in view.model.modules() if isinstance(m, AuroraLinear)]
    before = [m.get_delta_weight("default") for m in linears]
    view.model.get_submodule("mode_factors").aurora_U["default"][key].mul_(2)
    changed = [
        not torch.equal(m.get_delta_weight("default"), b)
        for m, b in zip(linears, before, strict=True)
    ]
    assert sum(changed) == moved
