"""MAM: prefix at attention, scaled parallel adapter at the MLP."""

import peft
import pytest
import torch
import torch.nn.functional as F

from mmtune.backbones import backbone_of
from mmtune.backbones.attention import extend
from mmtune.conformance.backbones import build, images_and_texts, pair_embeddings
from mmtune.tuners.mam import MamConfig
from mmtune.tuners.prefix import eject


def wrap(backbone="clip", **settings):
    model = build(backbone)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, MamConfig(**settings))
    return wrapped.eval(), backbone_of(model)


def randomise(wrapped):
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.normal_(std=0.3, generator=g)


def embeddings(model, view):
    with torch.no_grad():
        return pair_embeddings(model, view, images_and_texts(0, 3))


def test_count_of_a_layer_is_the_papers():
    """2 p d + 2 d m + m + d."""
    wrapped, _ = wrap(branches=["vision"], layers=[0], tokens=5, bottleneck=7)
    d = 48
    assert wrapped.get_nb_trainable_parameters()[0] == 2 * 5 * d + 2 * d * 7 + 7 + d


def test_only_the_prefix_moves_a_fresh_adapter():
    """W_up is zero: with the prefixes taken away, the output is the base's bit for bit."""
    wrapped, view = wrap(tokens=3, bottleneck=4)
    base = build("clip")
    want = embeddings(base, backbone_of(base))
    assert not torch.allclose(embeddings(wrapped, view), want)
    for site in view.sites():
        if site.role == "attention":
            extend(site.module, None)
    assert torch.equal(embeddings(wrapped, view), want)


def test_the_mlp_is_the_written_formula():
    """MLP(x) + 4 (W_up relu(W_down x + b_down) + b_up), x the MLP's input, in float64."""
    wrapped, view = wrap(branches=["text"], tokens=3, bottleneck=4)
    randomise(wrapped)
    wrapped.double()
    mlp = view.model.get_submodule("text_model.encoder.layers.0.mlp")
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    adapter = mlp.fc2.mmtune_adapter["default"]
    with torch.no_grad():
        found = mlp(x)
        fc1, fc2 = mlp.fc1.base_layer, mlp.fc2.base_layer
        down, up = adapter.down, adapter.up
        inner = F.relu(x @ down.T + adapter.down_bias) @ up.T + adapter.up_bias
        want = fc2(mlp.activation_fn(fc1(x))) + 4 * inner
    assert torch.allclose(found, want, atol=1e-12)


def test_a_branch_without_an_mlp_gets_only_the_prefix():
    wrapped, _ = wrap("blip-retrieval", branches=["fusion"], tokens=3, bottleneck=4)
    assert wrapped.get_nb_trainable_parameters()[0] == 2 * 2 * 3 * 32
    assert all("crossattention" in path for path in wrapped.peft_config["default"].adapted)


def test_eject_of_a_reparameterised_prefix_keeps_the_adapters():
    wrapped, view = wrap(tokens=3, bottleneck=4, reparameterise=True, prefix_bottleneck=6)
    randomise(wrapped)
    want = embeddings(wrapped, view)
    eject(wrapped)
    assert torch.equal(embeddings(wrapped, view), want)


@pytest.mark.parametrize("key", ["tokens", "bottleneck", "prefix_bottleneck", "scale"])
def test_settings_that_make_no_sense_are_refused(key):
    with pytest.raises(ValueError, match=f"mam.{key} must be"):
        MamConfig(**{key: 0})
