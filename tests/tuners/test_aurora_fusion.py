"""Aurora where branches fuse: gates and contexts inside the layers with cross-attention."""

import copy
import json
from functools import partial

import peft
import pytest
import torch
from torch.autograd import gradcheck

from mmtune import AuroraConfig, load_adapter, merge
from mmtune.backbones import backbone_of
from mmtune.backbones.base import SiteError
from mmtune.conformance import mllms
from mmtune.conformance.backbones import BACKBONES, build
from mmtune.tuners.aurora.context import TokenContext, gathered
from mmtune.tuners.aurora.fusing import FusedLayer
from mmtune.tuners.aurora.gate import ReferenceGate, TanhGate
from mmtune.tuners.aurora.layer import AuroraLinear

from ..backbones.blip_checks import close, generated, outputs

CROSS = ["q", "k", "v", "cross_q", "cross_k", "cross_v"]
BOTH_GATES = pytest.mark.parametrize("gate", ["tanh", "reference"])


def adapted(name, **settings):
    """A fresh adapter on a prepared backbone: (PeftModel, backbone view)."""
    model = build(name)
    view = backbone_of(model)
    view.prepare()
    config = AuroraConfig(**({"rank": 2, "seed": 0} | settings))
    return peft.get_peft_model(model, config).eval(), view


def randomise(wrapped, only="", seed=0):
    """Every trained number far from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if p.requires_grad and only in name:
                p.add_(0.5 * torch.randn(p.shape, generator=generator))
    return wrapped


def layers_of(wrapped):
    return [m for m in wrapped.modules() if isinstance(m, FusedLayer)]


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


MASK = torch.tensor([[[True, True, False]], [[True, True, True]]])


@pytest.mark.parametrize("mask", [None, MASK, MASK.double().sub(1).mul(10000)])
def test_gradients_of_context_in_float64(mask):
    assert gradcheck(partial(gathered, mask=mask), [drawn(2, 3, 4), drawn(2, 3, 4)])
    context = TokenContext().double()
    context.alpha.data.fill_(0.7)
    y, s = drawn(2, 3, 4), drawn(2, 3, 4)
    assert gradcheck(lambda y, s, _: context(y, s, mask), [y, s, context.alpha])


def test_gradients_of_gates_in_float64():
    tanh, reference = TanhGate(4).double(), ReferenceGate(4).double()
    for gate in (tanh, reference):
        for p in gate.parameters():
            p.data = torch.randn(4, dtype=torch.float64)
    assert gradcheck(lambda s, *_: tanh(s), [drawn(2, 3, 4), *tanh.parameters()])
    s, y = drawn(2, 3, 4), drawn(2, 3, 4)
    assert gradcheck(lambda s, y, *_: reference(s, y), [s, y, *reference.parameters()])


@torch.no_grad()
def test_the_reference_gate_starts_next_to_nothing():
    gate = ReferenceGate(4096, torch.Generator().manual_seed(0))
    for p in gate.parameters():
        assert abs(float(p.std()) / 0.0002 - 1) < 0.05
        assert abs(float(p.mean())) < 2e-5


def by_hand(y, s, gate, alpha):
    """One pair, t words without padding: the formulas word by word."""
    rows = []
    for i in range(len(y)):
        scores = torch.stack([(y[i] * s[j]).sum() / len(y[i]) ** 0.5 for j in range(len(s))])
        weights = scores.exp() / scores.exp().sum()
        context = sum(w * s[j] for j, w in enumerate(weights))
        rows.append(y[i] + alpha * context + gate.a.tanh() * (gate.gamma * s[i] + gate.beta))
    return torch.stack(rows)


@torch.no_grad()
def test_cross_attention_gets_what_the_formulas_say():
    model = build("blip-retrieval")
    view = backbone_of(model)
    view.prepare()
    seen = {}
    layer = model.text_encoder.encoder.layer[1]
    layer.crossattention.register_forward_hook(
        lambda _, args, output: seen.update(s=args[0], y=output[0])
    )
    wrapped = peft.get_peft_model(model, AuroraConfig(rank=2)).eval()
    layer.output.register_forward_pre_hook(lambda _, args: seen.update(changed=args[1]))
    randomise(wrapped)
    batch = BACKBONES["blip-retrieval"].batch(0, 3)
    wrapped(**batch)
    holder = layers_of(wrapped)[1]
    gate, alpha = holder.aurora_gate["default"], holder.aurora_context["default"].alpha
    lengths = batch["attention_mask"].sum(1).tolist()
    assert min(lengths) < 10
    for i, length in enumerate(lengths):
        want = by_hand(seen["y"][i, :length], seen["s"][i, :length], gate, alpha)
        assert close(seen["changed"][i, :length], want)
        assert not close(seen["y"][i, :length], want, 1e-2)


@BOTH_GATES
@torch.no_grad()
def test_the_score_of_a_pair_does_not_depend_on_its_batch(gate):
    wrapped, _ = adapted("blip-retrieval", gate=gate)
    batch = BACKBONES["blip-retrieval"].batch(0, 4)
    plain = wrapped(**batch).itm_score
    together = randomise(wrapped)(**batch).itm_score
    assert not close(together, plain, 1e-2)
    for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = {k: v[i : i + 1] for k, v in batch.items()}
        alone |= {k: alone[k][:, :length] for k in ("input_ids", "attention_mask")}
        assert close(wrapped(**alone).itm_score, together[i : i + 1])


@BOTH_GATES
@torch.no_grad()
def test_text_alone_is_left_as_it_is_bit_for_bit(gate):
    wrapped, _ = adapted("blip-retrieval", gate=gate)
    batch = BACKBONES["blip-retrieval"].batch(0, 3)
    call = partial(wrapped, **batch)
    with wrapped.disable_adapter():
        text, match = call(use_itm_head=False), call()
    # The factors stay at their start, so only gates and contexts could change anything.
    randomise(wrapped, only="mode_fusion")
    assert torch.equal(call(use_itm_head=False).question_embeds, text.question_embeds)
    assert not close(call().itm_score, match.itm_score, 1e-2)
    # A pass with an image leaves nothing behind for the next one without.
    assert torch.equal(call(use_itm_head=False).itm_score, text.itm_score)


@BOTH_GATES
@pytest.mark.parametrize("name", ["blip-vqa", "blip-caption"])
@torch.no_grad()
def test_cached_decoding_equals_uncached(name, gate):
    wrapped, view = adapted(name, gate=gate, sites=CROSS)
    base = generated(view.model, name)[1]
    randomise(wrapped)
    assert {layer.branch for layer in view.fusions()} >= {"language"}
    words, logits = generated(view.model, name, use_cache=True)
    again, uncached = generated(view.model, name, use_cache=False)
    assert torch.equal(words, again)
    assert close(logits, uncached)
    assert not close(logits, base, 1e-2)


@BOTH_GATES
@torch.no_grad()
def test_a_feed_forward_in_chunks_changes_nothing(gate):
    wrapped, view = adapted("blip-retrieval", gate=gate)
    randomise(wrapped)
    whole = outputs(wrapped, view, "blip-retrieval")
    for layer in view.model.text_encoder.encoder.layer:
        layer.chunk_size_feed_forward = 5
    assert close(outputs(wrapped, view, "blip-retrieval"), whole)


@BOTH_GATES
@torch.no_grad()
def test_compiled_in_one_graph_it_is_the_same(gate):
    wrapped, _ = adapted("blip-retrieval", gate=gate)
    randomise(wrapped)
    batch = BACKBONES["blip-retrieval"].batch(0, 3)
    torch._dynamo.reset()
    compiled = torch.compile(wrapped, backend="aot_eager", fullgraph=True)
    assert close(compiled(**batch).itm_score, wrapped(**batch).itm_score)


@torch.no_grad()
def test_a_pass_that_fails_half_way_leaves_nothing_behind():
    wrapped, view = adapted("blip-retrieval", gate="reference")
    randomise(wrapped)
    batch = BACKBONES["blip-retrieval"].batch(0, 3)
    text = wrapped(**batch, use_itm_head=False).question_embeds
    dense = view.model.text_encoder.encoder.layer[0].intermediate
    failing = dense.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        wrapped(**batch)
    failing.remove()
    assert torch.equal(wrapped(**batch, use_itm_head=False).question_embeds, text)


@BOTH_GATES
def test_a_copy_made_after_a_checkpointed_step_is_on_its_own(gate):
    wrapped, view = adapted("blip-retrieval", gate=gate)
    randomise(wrapped).train()
    view.set_gradient_checkpointing()
    wrapped(**BACKBONES["blip-retrieval"].batch(0, 3)).itm_score.sum().backward()
    wrapped.eval()
    other = copy.deepcopy(wrapped)
    with torch.no_grad():
        want = outputs(wrapped, view, "blip-retrieval")
        theirs = backbone_of(other.get_base_model())
        assert torch.equal(outputs(other, theirs, "blip-retrieval"), want)
        randomise(other, only="mode_fusion", seed=1)
        assert not close(outputs(other, theirs, "blip-retrieval"), want, 1e-2)
        assert torch.equal(outputs(wrapped, view, "blip-retrieval"), want)


@torch.no_grad()
def test_adapters_with_different_gates_take_turns_and_leave_nothing_behind():
    name = "blip-vqa"
    wrapped, view = adapted(name, gate="tanh", sites=CROSS)
    with wrapped.disable_adapter():
        base = outputs(wrapped, view, name)
    wrapped.add_adapter("second", AuroraConfig(rank=2, gate="reference", context="off"))
    wrapped.add_adapter("plain", AuroraConfig(rank=2, gate="off", context="off"))
    found = {}
    for adapter in ("default", "second", "plain"):
        wrapped.set_adapter(adapter)
        randomise(wrapped)
        found[adapter] = outputs(wrapped, view, name)
    for adapter, want in found.items():
        wrapped.set_adapter(adapter)
        assert torch.equal(outputs(wrapped, view, name), want)
    assert len({float(x.sum()) for x in found.values()}) == 3
    wrapped.delete_adapter("second")
    assert not [n for n, _ in wrapped.named_parameters() if ".second" in n]
    wrapped.set_adapter("default")
    assert torch.equal(outputs(wrapped, view, name), found["default"])
    stock = wrapped.unload()
    assert torch.equal(outputs(stock, view, name), base)
    assert not [n for n, _ in stock.named_modules() if n.startswith("mode_")]
    for fusion in view.fusions():
        for module in (fusion.begin, fusion.module, fusion.end):
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


@torch.no_grad()
def test_several_active_adapters_add_up():
    wrapped, view = adapted("blip-retrieval", gate="tanh", context="off")
    wrapped.add_adapter("second", AuroraConfig(rank=2, gate="tanh", context="off"))
    first, second = (layers_of(wrapped)[0].aurora_gate[n] for n in ("default", "second"))
    seen = []
    fusion = view.fusions()[0]
    fusion.module.register_forward_hook(lambda _, args, output: seen.append(output[0]))
    for gate, adapters in ((first, "default"), (second, "second"), (None, ["default", "second"])):
        wrapped.base_model.set_adapter(adapters)
        if gate is not None:
            outputs(wrapped, view, "blip-retrieval")
            gate.a.add_(0.3)
        outputs(wrapped, view, "blip-retrieval")
    base, one, other_base, other, both = seen
    assert torch.equal(base, other_base)
    assert close(both, one + other - base, 1e-6)


@pytest.mark.parametrize("name", ["blip-retrieval", "blip-caption"])
@torch.no_grad()
def test_fresh_under_autocast_is_the_base_bit_for_bit(name):
    wrapped, view = adapted(name)
    with torch.autocast("cpu", torch.bfloat16):
        fresh = outputs(wrapped, view, name)
        with wrapped.disable_adapter():
            assert torch.equal(outputs(wrapped, view, name), fresh)


@pytest.mark.parametrize(
    ("name", "settings", "gates", "contexts"),
    [
        ("clip", {}, "off", "off"),
        ("blip-retrieval", {}, "tanh", "tokens"),
        ("blip-retrieval", {"branches": ["vision", "text"]}, "off", "off"),
        ("blip-retrieval", {"sites": {"text": ["q"]}}, "off", "off"),
        ("blip-retrieval", {"gate": "off"}, "off", "tokens"),
        ("blip-vqa", {"context": "off"}, "tanh", "off"),
        ("blip-caption", {}, "tanh", "off"),
        ("blip2-opt", {}, "tanh", "off"),
    ],
)
def test_what_is_left_open_is_settled_and_recorded(name, settings, gates, contexts, tmp_path):
    wrapped, _ = adapted(name, **settings)
    wrapped.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["gate"], saved["context"]) == (gates, contexts)
    found = {type(g) for layer in layers_of(wrapped) for g in layer.aurora_gate.values()}
    assert found == ({TanhGate} if gates == "tanh" else set())
    again = load_adapter(build(name), tmp_path).peft_config["default"]
    assert (again.gate, again.context) == (gates, contexts)


def test_chosen_layers_alone_get_a_gate_and_words_alone_a_context():
    wrapped, _ = adapted("blip-vqa", layers=[-1], gate="reference", context="tokens")
    names = {n.split(".")[0] for n, _ in wrapped.get_base_model().named_parameters()}
    fused = sorted(n for n in names if n.startswith("mode_fusion"))
    assert fused == ["mode_fusion_fusion_1", "mode_fusion_language_1"]
    assert [len(layer.aurora_context) for layer in layers_of(wrapped)] == [1, 0]
    assert [len(layer.aurora_gate) for layer in layers_of(wrapped)] == [1, 1]


def test_a_q_former_with_every_other_layer_reading():
    model = mllms.blip2_opt(cross_attention_frequency=2, num_hidden_layers=4)
    backbone_of(model).prepare()
    wrapped = peft.get_peft_model(model, AuroraConfig(rank=2, layers="last:2"))
    assert [n for n, m in model.named_children() if isinstance(m, FusedLayer)] == [
        "mode_fusion_fusion_2"
    ]
    assert sum(p.numel() for p in layers_of(wrapped)[0].parameters()) == 3 * 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"branches": ["vision"], "gate": "tanh"}, "gate is tanh, but blip in vision has no layer"),
        ({"branches": ["text"], "context": "tokens"}, "blip in text has no layer in which words"),
        (
            {"branches": ["language"], "context": "tokens"},
            "in which words that all see one another",
        ),
    ],
)
def test_what_no_chosen_layer_can_have_is_told(settings, message):
    with pytest.raises(SiteError, match=message):
        adapted("blip-vqa", **settings)


def test_merging_says_what_no_weight_can_hold_and_how_to_mend_it():
    wrapped, _ = adapted("blip-retrieval", gate="reference")
    message = "cannot be merged: adapter 'default' .* gate reference and context tokens, which no"
    with pytest.raises(ValueError, match=message):
        merge(wrapped)
    with pytest.raises(ValueError, match="gate: off and context: off"):
        wrapped.merge_adapter()
    wrapped, _ = adapted("blip-caption", gate="off")
    assert type(merge(wrapped)) is type(build("blip-caption"))


def test_a_seed_makes_the_reference_gate():
    def vectors(seed):
        wrapped, _ = adapted("blip-caption", gate="reference", seed=seed)
        return torch.cat([p for layer in layers_of(wrapped) for p in layer.parameters()])

    assert torch.equal(vectors(3), vectors(3))
    assert not torch.equal(vectors(3), vectors(4))


def test_projections_that_read_the_same_tokens_compute_together():
    sites = {"text": ["q", "k", "v"], "fusion": ["cross_q", "cross_k", "cross_v"]}
    found = []
    for compute in ("separate", "materialise"):
        wrapped, _ = adapted("blip-retrieval", compute=compute, sites=sites, rank=4)
        randomise(wrapped)
        found.append(wrapped(**BACKBONES["blip-retrieval"].batch(0, 3)).itm_score)
        for module in wrapped.modules():
            if isinstance(module, AuroraLinear):
                roles = {m.role for m in module.siblings.members}
                together = [{"q", "k", "v"}, {"cross_k", "cross_v"}, {"cross_q"}]
                assert roles == next(group for group in together if module.role in group)
                assert not module.siblings._waiting
    assert close(*found)
