"""Checkpoints of the original BLIP: every key finds its place, or is named."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModel, PreTrainedTokenizerFast

from mmtune import backbones, cli
from mmtune.backbones import architectures, blip_checkpoints
from mmtune.backbones.blip_checkpoints import CheckpointError, convert, interpolated
from tests.backbones import original_blip as blip

KINDS = ("retrieval", "vqa", "caption")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def inputs():
    g = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, blip.PATCH * blip.SIDE, blip.PATCH * blip.SIDE, generator=g)
    return pixels, torch.randint(1, blip.WORDS, (2, 7), generator=g)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_returns_to_its_place(kind):
    model = blip.stock(kind)
    found = convert(blip.original(model), kind)
    want = model.state_dict()
    have = found.model.state_dict()
    assert have.keys() == want.keys()
    assert all(torch.equal(have[name], want[name]) for name in want)
    assert found.replaced == []
    assert found.trained_at == 32
    assert found.temperature == pytest.approx(0.03)


def test_what_is_left_out_is_counted():
    model = blip.stock("retrieval")
    state = blip.original(model)
    heads = sum(name.startswith("itm_head") for name in state)
    own = len(model.state_dict())
    found = convert(state | {"text_decoder.bert.x": torch.zeros(1)}, "retrieval").left_out
    assert found == {
        "momentum copies": own - heads,
        "queues": 4,
        "temperature": 1,
        "position ids": 1,
        "text_decoder, of which retrieval has none": 1,
    }


def test_vision_tower_computes_what_the_fused_original_does():
    state = blip.original(blip.stock("caption", seed=3))
    pixels, _ = inputs()
    model = convert(state, "caption").model
    got = model.vision_model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(got, blip.vision(state, pixels), rtol=1e-4, atol=1e-5)
    swapped = dict(state)
    for i in range(2):
        for end in ("weight", "bias"):
            name = f"visual_encoder.blocks.{i}.attn.qkv.{end}"
            q, k, v = state[name].chunk(3)
            swapped[name] = torch.cat([q, v, k])
    assert (got - blip.vision(swapped, pixels)).abs().max() > 0.01


def test_match_scores_and_similarities_are_those_of_the_original():
    state = blip.original(blip.stock("retrieval", seed=4))
    pixels, ids = inputs()
    model = convert(state, "retrieval").model
    image = blip.vision(state, pixels)
    mask = torch.ones_like(ids)
    batch = {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}

    fused = blip.text(state, "text_encoder", ids, image)[:, 0]
    want = fused @ state["itm_head.weight"].T + state["itm_head.bias"]
    torch.testing.assert_close(model(**batch).itm_score, want, rtol=1e-4, atol=1e-4)

    alone = blip.text(state, "text_encoder", ids)[:, 0]
    one = image[:, 0] @ state["vision_proj.weight"].T + state["vision_proj.bias"]
    two = alone @ state["text_proj.weight"].T + state["text_proj.bias"]
    want = torch.cosine_similarity(one[:, None], two[None], dim=-1)
    got = model(**batch, use_itm_head=False).itm_score
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["caption", "vqa"])
def test_decoder_computes_what_the_original_does(kind):
    state = blip.original(blip.stock(kind, seed=5))
    pixels, ids = inputs()
    model = convert(state, kind).model
    source = blip.vision(state, pixels)
    if kind == "vqa":
        source = blip.text(state, "text_encoder", ids, source)
    answers = ids[:, :4]
    hidden = blip.text(state, "text_decoder.bert", answers, source, causal=True)
    got = model.text_decoder(
        input_ids=answers, attention_mask=torch.ones_like(answers), encoder_hidden_states=source
    )
    torch.testing.assert_close(got.logits, blip.logits(state, hidden), rtol=1e-4, atol=1e-4)


def test_pre_training_leaves_the_output_layer_untied_and_its_value_wins():
    state = blip.original(blip.stock("caption"), extras=False)
    words, out = "text_decoder.bert.embeddings.word_embeddings.weight", blip_checkpoints.OUTPUT
    state[f"{out}.bias"] = state[f"{out}.bias"][:-2].clone()
    state[f"{out}.decoder.weight"] = state[f"{out}.decoder.weight"] + 1
    state[f"{out}.decoder.bias"] = state[f"{out}.decoder.bias"] + 2
    want = {f"{out}.decoder.{end}": state[f"{out}.decoder.{end}"] for end in ("weight", "bias")}
    found = convert(state, "caption")
    assert found.replaced == [words, f"{out}.bias"]
    have = found.model.state_dict()
    assert torch.equal(have[words], want[f"{out}.decoder.weight"])
    assert torch.equal(have[f"{out}.decoder.bias"], want[f"{out}.decoder.bias"])
    assert torch.equal(have[f"{out}.bias"], want[f"{out}.decoder.bias"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"visual_encoder.blocks.1.norm1.bias": None},
            "missing key(s): vision_model.encoder.layers",
        ),
        ({"text_encoder.encoder.layer.0.output.dense.weight": None}, "0.output.dense.weight"),
        ({"visual_encoder.pos_embed": None}, "the key visual_encoder.pos_embed is missing"),
        ({"cls_head.0.weight": torch.zeros(1)}, "unknown key(s): cls_head.0.weight"),
        (
            {"visual_encoder.norm_pre.bias": torch.zeros(1)},
            "unknown key(s): visual_encoder.norm_pre",
        ),
        ({"text_encoder.pooler.dense.bias": torch.zeros(1)}, "text_encoder.pooler.dense.bias"),
        ({"itm_head.weight": torch.zeros(3, 128)}, "itm_head.weight: [3, 128], expected [2, 128]"),
        ({"visual_encoder.pos_embed": torch.zeros(1, 12, 128)}, "12 positions"),
    ],
)
def test_a_key_that_does_not_fit_is_named(change, message):
    state = blip.original(blip.stock("retrieval")) | change
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(CheckpointError, match=re.escape(message)):
        convert(state, "retrieval")


def test_unknown_kind_and_size_are_refused():
    state = blip.original(blip.stock("caption"))
    with pytest.raises(CheckpointError, match="Did you mean 'caption'"):
        convert(state, "captions")
    with pytest.raises(CheckpointError, match=r"multiple of the 8 pixels.*Try 48"):
        convert(state, "caption", 50)


def test_position_embeddings_are_interpolated_channel_by_channel():
    g = torch.Generator().manual_seed(0)
    positions = torch.randn(1, 17, 6, generator=g)
    got = interpolated(positions, 7)
    assert torch.equal(got[:, 0], positions[:, 0])
    for channel in range(6):
        grid = positions[0, 1:, channel].reshape(1, 1, 4, 4)
        want = torch.nn.functional.interpolate(grid, size=(7, 7), mode="bicubic")
        assert torch.equal(got[0, 1:, channel].reshape(7, 7), want[0, 0])
    assert interpolated(positions, 4) is positions


def test_image_size_is_that_asked_for():
    state = blip.original(blip.stock("retrieval"))
    found = convert(state, "retrieval", 48)
    assert found.trained_at == 32
    assert found.model.config.vision_config.image_size == 48
    have = found.model.state_dict()["vision_model.embeddings.position_embedding"]
    assert torch.equal(have, interpolated(state["visual_encoder.pos_embed"], 6))
    found.model(input_ids=inputs()[1], pixel_values=torch.zeros(2, 3, 48, 48))


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("content", [{"model": Code()}, {"epoch": 3}, [torch.zeros(1)]])
def test_a_file_with_code_or_without_tensors_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth"):
        blip_checkpoints.read_checkpoint("x.pth")
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model_base_retrieval_small.pth"
    torch.save({"model": blip.original(blip.stock("retrieval")), "epoch": 5}, path)
    return path


def words(folder, size):
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    vocabulary = {token: i for i, token in enumerate(special.values())}
    vocabulary |= {f"w{i}": i for i in range(len(special), size)}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")), **special
    )
    fast.save_pretrained(folder)
    return str(folder)


def test_converted_folder_is_a_stock_model(checkpoint, tmp_path, capsys):
    out = tmp_path / "small"
    tokenizer = words(tmp_path / "words", blip.WORDS - 2)
    command = ["convert", "blip", str(checkpoint), "--kind", "retrieval", "--out", str(out)]
    assert cli.main([*command, "--tokenizer", tokenizer, "--image-size", "48"]) == 0
    printed = capsys.readouterr().out
    assert "momentum copies" in printed
    assert "0.03" in printed
    assert json.loads((out / "config.json").read_text())["architectures"] == [
        "BlipForImageTextRetrieval"
    ]
    loaded = backbones.load(f"hf:{out}")
    assert loaded.image.size == 48
    assert loaded.image.resize == "squash"
    want = convert(blip_checkpoints.read_checkpoint(checkpoint), "retrieval", 48).model
    have = loaded.model.state_dict()
    assert all(torch.equal(have[name], value) for name, value in want.state_dict().items())
    ids = loaded.tokenize(["[DEC] w5 [ENC]"])["input_ids"][0].tolist()
    assert ids[0] == blip.WORDS - 2
    assert ids[-1] == blip.WORDS - 1 == loaded.model.config.match_token_id
    assert AutoModel.from_pretrained(out).config.text_config.num_attention_heads == blip.HEADS
    assert cli.main([*command, "--tokenizer", tokenizer]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("size", [None, 40])
def test_without_the_right_tokenizer_the_model_is_written_and_the_lack_is_said(
    checkpoint, tmp_path, capsys, size
):
    tokenizer = "bert-base-uncased" if size is None else words(tmp_path / "words", size)
    out = tmp_path / "small"
    command = ["convert", "blip", str(checkpoint), "--kind", "retrieval", "--out", str(out)]
    assert cli.main([*command, "--tokenizer", tokenizer]) == 1
    err = capsys.readouterr().err
    assert "no tokenizer 'bert-base-uncased'" in err if size is None else "[40, 41]" in err
    assert "--tokenizer" in err
    assert (out / "model.safetensors").exists()
    assert not (out / "tokenizer.json").exists()


def test_missing_file_is_named(tmp_path, capsys):
    command = ["convert", "blip", "none.pth", "--kind", "vqa", "--out", str(tmp_path / "x")]
    assert cli.main(command) == 2
    assert "none.pth" in capsys.readouterr().err


# Parameters of the released models: a ViT-B/16 or ViT-L/16, BERT-base with cross-attention.
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("blip-itm-base-coco", 223_744_258),
        ("blip-vqa-base", 361_230_140),
        ("blip-image-captioning-large", 446_290_492),
        ("clip-vit-base-patch32", 151_277_313),
        ("clip-vit-large-patch14", 427_616_513),
    ],
)
def test_published_sizes(name, count):
    with torch.device("meta"):
        model = architectures.architecture(f"someone/{name}").model()
    assert sum(p.numel() for p in model.parameters()) == count


def test_converted_names_are_known_by_size():
    large = architectures.architecture("./models/blip-large-retrieval-224")
    config = large.config()
    assert config.architectures == ["BlipForImageTextRetrieval"]
    assert (config.vision_config.hidden_size, config.vision_config.num_attention_heads) == (
        1024,
        16,
    )
    assert config.text_config.encoder_hidden_size == 1024
    assert config.text_config.num_attention_heads == 12
    assert config.match_token_id == 30523
    assert large.image.size == config.vision_config.image_size == 224
    assert architectures.architecture("someone/else") is None


def test_stand_in_words_have_the_real_special_ids():
    known = architectures.architecture("blip-vqa-base")
    tokenizer = known.tokenizer()
    assert len(tokenizer) == 30524
    assert tokenizer("word7 dog nonsense")["input_ids"] == [101, 7, 1002, 100, 102]
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[DEC]", "[ENC]"]) == [0, 30522, 30523]
    assert tokenizer.bos_token_id == 30522
