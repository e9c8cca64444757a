"""P-tuning: the encoders, where tokens enter, and what is left when the encoder is dropped."""

import peft
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from mmtune import load_adapter
from mmtune.backbones import backbone_of
from mmtune.conformance.backbones import build, images_and_texts
from mmtune.tuners.prompt import PromptConfig, ensemble_embeddings
from mmtune.tuners.ptuning import PTuningConfig, eject
from tests.tuners.by_hand import BOTH, images, made, pooled, spliced, texts, words

ENCODERS = pytest.mark.parametrize("encoder", ["mlp", "lstm"])


def tuned(model, **settings):
    backbone_of(model).prepare()
    wrapped = get_peft_model(model, PTuningConfig(**settings)).eval()
    return wrapped, backbone_of(wrapped)


def holder(model, branch):
    return model.get_submodule(f"ptuning_{branch}")


def pefts_encoder(layer, kind, p, d, w):
    """PEFT's own prompt encoder with this layer's parameters."""
    config = peft.PromptEncoderConfig(
        num_virtual_tokens=p,
        token_dim=d,
        num_transformer_submodules=1,
        encoder_reparameterization_type=kind.upper(),
        encoder_hidden_size=w,
        encoder_num_layers=2,
        encoder_dropout=0.0,
    )
    encoder = peft.PromptEncoder(config)
    encoder.embedding.weight.data = layer.mmtune_tokens["default"].data
    linears = [m for m in encoder.mlp_head if isinstance(m, torch.nn.Linear)]
    mine = [layer.mmtune_fc1, layer.mmtune_fc2, layer.mmtune_fc3][-len(linears) :]
    for linear, group in zip(linears, mine, strict=True):
        linear.load_state_dict(group["default"].state_dict())
    if kind == "lstm":
        lstm = layer.mmtune_lstm["default"]
        for number in (0, 1):
            for way, suffix in enumerate(("", "_reverse")):
                end = f"l{number}{suffix}"
                parts = {
                    "weight_ih": getattr(lstm, f"input_{number}")[way].T,
                    "weight_hh": getattr(lstm, f"state_{number}")[way].T,
                    "bias_ih": getattr(lstm, f"bias_{number}")[way, 0],
                    "bias_hh": torch.zeros(4 * w),
                }
                for name, value in parts.items():
                    getattr(encoder.lstm_head, f"{name}_{end}").data = value.detach().clone()
    return encoder


@ENCODERS
def test_tokens_and_gradients_are_those_of_pefts_encoder(encoder):
    wrapped, _ = tuned(build("clip"), tokens=5, encoder=encoder, width=8, seed=1)
    layer = holder(wrapped, "text")
    other = pefts_encoder(layer, encoder, p=5, d=32, w=8)
    found, want = layer.tokens("default"), other(torch.arange(5))
    assert torch.allclose(found, want, atol=1e-6)
    found.pow(3).sum().backward()
    want.pow(3).sum().backward()
    mine, theirs = layer.mmtune_tokens["default"].grad, other.embedding.weight.grad
    assert mine.abs().max() > 0
    assert torch.allclose(mine, theirs, atol=1e-6)


@ENCODERS
def test_fresh_encoders_are_as_wide_spread_as_pytorchs(encoder):
    """Uniform within 1 / sqrt of the input's width (Linear) or the state's (LSTM)."""
    wrapped, _ = tuned(build("clip"), tokens=2, encoder=encoder, width=64, seed=1)
    layer = holder(wrapped, "vision")
    bounds = {"mmtune_fc2": 64**-0.5, "mmtune_fc3": 64**-0.5, "mmtune_fc1": 48**-0.5}
    if encoder == "lstm":
        bounds = {"mmtune_fc2": 128**-0.5, "mmtune_fc3": 128**-0.5, "mmtune_lstm": 64**-0.5}
    for group, bound in bounds.items():
        for p in getattr(layer, group)["default"].parameters():
            assert 0.9 * bound < p.abs().max() <= bound


def test_a_seed_decides_the_start():
    first, second, other = (
        tuned(build("clip"), tokens=2, encoder="lstm", width=4, seed=seed)[0] for seed in (1, 1, 2)
    )
    state = [peft.get_peft_model_state_dict(m) for m in (first, second, other)]
    assert all(torch.equal(state[0][k], state[1][k]) for k in state[0])
    assert not any(torch.equal(state[0][k], state[2][k]) for k in state[0])


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("positions", [[0, 1, 1, 5], [30, 2, 2, 99]])
def test_tokens_enter_where_they_are_told(name, positions):
    model, lengths = made(name), [77, 12]
    wrapped, view = tuned(model, tokens=4, positions=positions, branches=["text"], seed=1)
    ids = texts(lengths)
    with torch.no_grad():
        tokens = holder(model, "text").tokens("default").double()
        found = view.encode_text(wrapped, ids)
        want = []
        for row, n in zip(ids, lengths, strict=True):
            end = n - 1 + sum(place <= n - 1 for place in positions)
            sequence = spliced(words(model, row), tokens, positions)
            want.append(pooled(view, "text", sequence, end))
    assert torch.allclose(found, torch.stack(want), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.filterwarnings(
    "ignore:You are trying to modify", "ignore:Already found a `peft_config`"
)
def test_in_a_prompted_model_places_count_the_prompt(name):
    """The last to enter are the first to leave: no word is taken out for a token."""
    model, ids = made(name), texts([20])
    prompted = get_peft_model(model, PromptConfig(tokens=3, branches=["text"], seed=2))
    _, view = tuned(model, tokens=2, positions=[2, 21], branches=["text"], seed=1)
    with torch.no_grad():
        found = view.encode_text(prompted, ids)[0]
        prompt = model.get_submodule("prompt_text").tokens("default").double()
        tokens = holder(model, "text").tokens("default").double()
        sequence = spliced(spliced(words(model, ids[0]), prompt, [1] * 3), tokens, [2, 21])
        assert torch.allclose(found, pooled(view, "text", sequence, 19 + 5), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", BOTH)
def test_a_token_behind_the_end_of_text_changes_nothing(name):
    """CLIP's text tower is causal and reads the end-of-text token, here at index 8."""
    model, ids = made(name), texts([9, 9])
    view = backbone_of(model)
    view.prepare()
    with torch.no_grad():
        base = view.encode_text(model, ids)
        wrapped, view = tuned(model, tokens=2, positions=[9, 20], branches=["text"])
        assert torch.allclose(view.encode_text(wrapped, ids), base, atol=1e-14, rtol=0)
        layer = holder(model, "text")
        layer.at["default"] = (8, 20)
        assert not torch.allclose(view.encode_text(wrapped, ids), base, atol=1e-3)


@pytest.mark.parametrize("name", BOTH)
def test_among_patches_the_place_does_not_matter(name):
    """A bidirectional tower whose tokens hold no position."""
    found = []
    for positions in ("start", [0, 0, 0], [4, 9, 2], [99, 99, 99]):
        model = made(name)
        wrapped, view = tuned(
            model, tokens=3, encoder="none", positions=positions, branches=["vision"], seed=1
        )
        with torch.no_grad():
            found.append(view.encode_image(wrapped, images(2)))
    assert all(torch.allclose(f, found[0], atol=1e-12, rtol=0) for f in found[1:])


@ENCODERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_its_encoder_it_is_the_same_bit_for_bit(encoder, dtype, tmp_path):
    model, batch = build("clip").to(dtype), images_and_texts(0, 3)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    wrapped, view = tuned(model, tokens=4, encoder=encoder, width=8, positions=[1, 1, 2, 5])
    with torch.no_grad():
        want = view.embed_pairs(wrapped, batch)
    eject(wrapped)
    assert wrapped.get_nb_trainable_parameters()[0] == 4 * (48 + 32)
    wrapped.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in saved.values()) == 4 * (48 + 32)
    again = load_adapter(build("clip").to(dtype), tmp_path).eval()
    with torch.no_grad():
        for found in (
            view.embed_pairs(wrapped, batch),
            backbone_of(again).embed_pairs(again, batch),
        ):
            assert torch.equal(found.image, want.image)
            assert torch.equal(found.text, want.text)


@ENCODERS
def test_under_autocast_the_encoder_keeps_its_precision(encoder):
    """So what is stored on ejecting is what was trained."""
    wrapped, view = tuned(build("clip"), tokens=4, encoder=encoder, width=8)
    ids = images_and_texts(0, 3)["input_ids"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = view.encode_text(wrapped, ids)
    eject(wrapped)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(view.encode_text(wrapped, ids), want)


def test_only_one_of_two_adapters_is_ejected():
    wrapped, _ = tuned(build("clip"), tokens=3, width=8, seed=1)
    wrapped.add_adapter("second", PTuningConfig(tokens=3, encoder="lstm", width=8, seed=2))
    batch = images_and_texts(0, 2)
    with torch.no_grad():
        want = ensemble_embeddings(wrapped, batch, ["second", "default"])
        eject(wrapped, "second")
        found = ensemble_embeddings(wrapped, batch, ["second", "default"])
    assert torch.equal(found.text, want.text)
    layer = holder(wrapped, "text")
    assert list(layer.mmtune_fc3) == ["default"]
    assert list(layer.mmtune_lstm) == []
    with pytest.raises(
        ValueError, match=r"'second' has no encoder to drop.*there are default \(PT"
    ):
        eject(wrapped, "second")


@ENCODERS
def test_the_encoder_compiles_without_a_break(encoder):
    wrapped, view = tuned(build("clip"), tokens=3, encoder=encoder, width=4, positions=[1, 2, 4])
    torch._dynamo.reset()
    explained = torch._dynamo.explain(lambda ids: view.encode_text(wrapped, ids))(
        images_and_texts(0, 2)["input_ids"]
    )
    assert explained.graph_break_count == 0


def test_a_prompt_has_no_encoder_to_drop():
    model = build("clip")
    backbone_of(model).prepare()
    with pytest.raises(ValueError, match=r"one of method ptuning .* there are default \(PROMPT\)"):
        eject(get_peft_model(model, PromptConfig(tokens=2)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "gru"}, "mlp, lstm or none, got 'gru'"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"positions": "end"}, "'start' or a list of indices, got 'end'"),
        ({"tokens": 3, "positions": [1, 2]}, "names 2 places for ptuning.tokens = 3"),
        ({"tokens": 2, "positions": [1, -2]}, "not be negative, got -2"),
        ({"layers": [0]}, "must be 'all', got"),
        ({"tokens": 9}, "ptuning.tokens is 9, but text was trained on texts of 10"),
    ],
)
def test_wrong_settings_are_told(settings, message):
    with pytest.raises(ValueError, match=message):
        tuned(build("clip"), **settings)
