"""One export, three stock classes: the same weights, the same texts, the same outputs."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BlipForQuestionAnswering

from mmtune import zoo
from mmtune.backbones import loading
from mmtune.zoo.blip import CLASSES, FILES, blip_model, save_blip
from mmtune.zoo.tiny_blip.model import to_decoder
from tests.zoo.small_blip import RECIPE, small_model, write


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def trained(root):
    return write(root / "tiny-blip")


@pytest.fixture(scope="module")
def loaded(root, trained):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "MODEL_ROOT", root)
        yield {flavour: zoo.load("tiny-blip", flavour) for flavour in CLASSES}


def test_flavours_are_the_stock_classes(root, loaded, monkeypatch):
    monkeypatch.setattr(zoo, "MODEL_ROOT", root)
    assert {f: type(found.model).__name__ for f, found in loaded.items()} == CLASSES
    assert zoo.flavours("tiny-blip") == ("retrieval", "vqa", "caption")
    assert type(zoo.load("tiny-blip").model).__name__ == CLASSES["retrieval"]
    assert type(loading.load("zoo:tiny-blip@vqa").model).__name__ == CLASSES["vqa"]
    assert loaded["vqa"].name == "zoo:tiny-blip@vqa"
    for found in loaded.values():
        assert not found.model.training
        assert {p.dtype for p in found.model.parameters()} == {torch.float32}
        assert found.backbone.family == "blip"
        assert (found.image.size, found.image.resize) == (RECIPE.image_size, "squash")
        assert found.image.mean == found.image.std == (0.5, 0.5, 0.5)
    with pytest.raises(zoo.ZooError, match="flavour 'hf'; it has retrieval, vqa, caption"):
        zoo.load("tiny-blip", "hf")


def test_classes_share_weights_bit_for_bit(loaded):
    retrieval, vqa, caption = (loaded[f].model.state_dict() for f in CLASSES)
    for name, tensor in vqa.items():
        for other in (retrieval, caption):
            assert name not in other or torch.equal(tensor, other[name]), name
    assert {n for n in retrieval if n not in vqa} == {
        f"{head}.{kind}"
        for head in ("vision_proj", "text_proj", "itm_head")
        for kind in ("weight", "bias")
    }
    assert set(caption) < set(vqa)


def test_decoder_shares_all_of_the_encoder_but_self_attention(loaded):
    model = loaded["vqa"].model
    encoder, decoder = model.text_encoder.state_dict(), model.text_decoder.bert.state_dict()
    assert set(encoder) == set(decoder)
    own = {name for name in encoder if ".attention." in name}
    assert len(own) == RECIPE.text_layers * 10  # q, k, v, out and norm, each with a bias
    for name, tensor in encoder.items():
        assert torch.equal(tensor, decoder[name]) == (name not in own), name
    words = encoder["embeddings.word_embeddings.weight"]
    assert torch.equal(model.text_decoder.cls.predictions.decoder.weight, words)


def test_encoder_and_decoder_can_be_tuned_apart(loaded):
    model = loaded["vqa"].model
    pointers = [p.data_ptr() for p in model.text_encoder.parameters()]
    assert not set(pointers) & {p.data_ptr() for p in model.text_decoder.parameters()}


def test_every_weight_is_stored_once_in_half_precision(root, trained):
    stored = [load_file(root / "tiny-blip" / f"{file}.safetensors") for file in FILES]
    numbers = sum(t.numel() for part in stored for t in part.values())
    assert numbers == sum(p.numel() for p in trained.parameters())  # which counts tied ones once
    assert {t.dtype for part in stored for t in part.values()} == {torch.float16}


@pytest.fixture(scope="module")
def batch(loaded):
    texts = ["is there not a blue triangle?", "a red hat"]
    generator = torch.Generator().manual_seed(1)
    side = RECIPE.image_size
    return loaded["vqa"].tokenize(texts) | {
        "pixel_values": torch.rand(2, 3, side, side, generator=generator) * 2 - 1
    }


def test_stock_forwards_compute_what_was_trained(trained, loaded, batch):
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    with torch.no_grad():
        seen = trained.see(pixels)
        states, alone = trained.read(ids, seen), trained.read(ids)
        heads = trained.matching
        itm = loaded["retrieval"].model(**batch).itm_score
        torch.testing.assert_close(itm, heads.itm_head(states[:, 0]))
        pair = loaded["retrieval"].backbone.embed_pairs(loaded["retrieval"].model, batch)
        normalize = torch.nn.functional.normalize
        torch.testing.assert_close(pair.image, normalize(heads.vision_proj(seen[:, 0]), dim=-1))
        torch.testing.assert_close(pair.text, normalize(heads.text_proj(alone[:, 0]), dim=-1))
        told = to_decoder(ids)
        logits = (
            loaded["caption"]
            .model(pixel_values=pixels, input_ids=told, attention_mask=batch["attention_mask"])
            .logits
        )
        torch.testing.assert_close(logits, trained.tell(told, seen))


def greedy(trained, states, steps):
    ids = torch.full((len(states), 1), 5)
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat([ids, trained.tell(ids, states)[:, -1:].argmax(-1)], dim=1)
    return ids


def test_stock_generation_continues_the_begin_token(trained, loaded, batch):
    pixels, steps = batch["pixel_values"], 4
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
    with torch.no_grad():
        seen = trained.see(pixels)
        states = trained.read(batch["input_ids"], seen)
    mine = greedy(trained, seen, steps), greedy(trained, states, steps)
    assert not torch.equal(*mine)  # a question changes what is said of the pictures
    for found, model in zip(mine, (loaded["caption"], loaded["vqa"]), strict=True):
        inputs = batch if model is loaded["vqa"] else {"pixel_values": pixels}
        assert (found != 3).all()  # min_new_tokens would otherwise change what is chosen
        assert torch.equal(model.model.generate(**inputs, **options), found)


def test_texts_begin_and_end_alike_in_all_classes(loaded):
    texts = ["a red hat", "What color is the circle?"]
    first, *others = (found.tokenize(texts) for found in loaded.values())
    for other in others:
        assert torch.equal(first["input_ids"], other["input_ids"])
    ids, mask = first["input_ids"], first["attention_mask"]
    assert ids[:, 0].tolist() == [2, 2]
    assert [row[m.bool()][-1].item() for row, m in zip(ids, mask, strict=True)] == [3, 3]
    assert torch.equal(ids == 0, mask == 0)
    assert to_decoder(ids)[:, 0].tolist() == [5, 5]
    config = loaded["vqa"].model.config.text_config
    assert (config.bos_token_id, config.sep_token_id, config.eos_token_id) == (5, 3, 3)
    assert loaded["vqa"].tokenize(["red " * 40])["input_ids"].shape == (1, RECIPE.context)


def test_stock_class_saves_and_loads(loaded, tmp_path):
    loaded["vqa"].model.save_pretrained(tmp_path)
    again = BlipForQuestionAnswering.from_pretrained(tmp_path).state_dict()
    for name, tensor in loaded["vqa"].model.state_dict().items():
        assert torch.equal(again[name], tensor), name


def test_weights_that_should_be_tied_and_are_not_are_refused(tmp_path):
    model = small_model()
    tensors = model.tensors()
    name = "text_decoder.bert.encoder.layer.0.output.dense.weight"
    with pytest.raises(ValueError, match=r"layer\.0\.output\.dense\.weight differs from text_enc"):
        save_blip(tensors | {name: tensors[name] + 1}, model.config, tmp_path)


def test_damaged_folders_are_named(root, trained, tmp_path):
    model = write(tmp_path)
    path = tmp_path / "decoder.safetensors"
    stored = load_file(path)
    lost = "text_decoder.cls.predictions.bias"
    save_file({n: t for n, t in stored.items() if n != lost}, path)
    with pytest.raises(ValueError, match=r"lacks tensors for BlipForCond.*cls\.predictions\.bias"):
        blip_model(tmp_path, "caption")
    head = blip_model(tmp_path, "retrieval").itm_head  # which needs none of that file
    assert torch.equal(head.weight, model.matching.itm_head.weight)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["vocab_size"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"do not fit config\.json"):
        blip_model(tmp_path, "retrieval")
