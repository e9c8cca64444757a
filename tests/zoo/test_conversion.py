"""One set of weights, two stock classes, the same outputs."""

import io
import json

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from mmtune import zoo
from mmtune.zoo.conversion import hf_config, open_clip_config, to_hf, to_open_clip

TEXT = {"vocab_size": 60, "width": 24, "heads": 3, "layers": 2, "context_length": 10}
VISION = {"image_size": 16, "patch_size": 4, "width": 32, "head_width": 8, "layers": 2}
TEXTS = [
    "a red apple",
    "Five of HEARTS, simple playing card",
    "it's   naïve: 12 \U0001f600 œuvres",
    "",
    "word " * 50,
    "<|endoftext|> and on",
]


def features(output):
    return output if isinstance(output, torch.Tensor) else output.pooler_output


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_random_open_clip_equals_its_conversion(quick_gelu):
    torch.manual_seed(0)
    model = open_clip.CLIP(
        16, open_clip.CLIPVisionCfg(**VISION), open_clip.CLIPTextCfg(**TEXT), quick_gelu=quick_gelu
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    config = {"embed_dim": 16, "text_cfg": TEXT, "vision_cfg": VISION, "quick_gelu": quick_gelu}
    other = CLIPModel(hf_config(config, pad_token_id=57)).eval()
    other.load_state_dict(to_hf(model.state_dict()), strict=False)
    pixels, ids = torch.randn(3, 3, 16, 16), torch.randint(0, 57, (4, 10))
    ids[:, 6], ids[:, 7:] = 59, 57
    with torch.no_grad():
        for ours, theirs in (
            (model.encode_image(pixels), other.get_image_features(pixel_values=pixels)),
            (model.encode_text(ids), other.get_text_features(input_ids=ids)),
        ):
            torch.testing.assert_close(ours, features(theirs), atol=1e-5, rtol=1e-5)
    back = to_open_clip(other.state_dict())
    for name, tensor in model.state_dict().items():
        if name != "attn_mask":
            assert torch.equal(back[name], tensor), name


def test_configs_round_trip():
    config = {"embed_dim": 16, "text_cfg": TEXT, "vision_cfg": VISION}
    written = open_clip_config(hf_config(config, 57), 0.5, 0.5)["model_cfg"]
    assert {k: written["text_cfg"][k] for k in TEXT} == TEXT
    assert {k: written["vision_cfg"][k] for k in VISION} == VISION


def test_foreign_weights_and_features_are_refused():
    with pytest.raises(ValueError, match="timm_model_name"):
        hf_config(
            {"embed_dim": 4, "text_cfg": TEXT, "vision_cfg": VISION | {"timm_model_name": "x"}}, 0
        )
    torch.manual_seed(0)
    state = open_clip.CLIP(
        16, open_clip.CLIPVisionCfg(**VISION), open_clip.CLIPTextCfg(**TEXT)
    ).state_dict()
    with pytest.raises(KeyError, match=r"visual\.extra"):
        to_hf(state | {"visual.extra.weight": torch.zeros(1)})


@pytest.fixture(scope="module")
def both():
    return zoo.load("tiny-clip"), zoo.load("tiny-clip", flavour="hf")


def test_shipped_model_gives_the_same_embeddings_in_both_classes(both):
    ours, theirs = both
    rows = pq.read_table(zoo.data_path("clipart-animals", "val")).slice(0, 6).to_pylist()
    _, _, preprocess = open_clip.create_model_and_transforms(
        f"local-dir:{zoo.model_path('tiny-clip')}"
    )
    images = [Image.open(io.BytesIO(r["image"]["bytes"])).convert("RGB") for r in rows]
    pixels = torch.stack([preprocess(image) for image in images])
    with torch.no_grad():
        torch.testing.assert_close(
            ours.backbone.encode_image(ours.model, pixels),
            theirs.backbone.encode_image(theirs.model, pixels),
            atol=1e-5,
            rtol=0,
        )
        first, second = ours.tokenize(TEXTS), theirs.tokenize(TEXTS)
        torch.testing.assert_close(
            ours.backbone.encode_text(ours.model, **first),
            theirs.backbone.encode_text(theirs.model, **second),
            atol=1e-5,
            rtol=0,
        )


def test_stock_preprocessing_is_the_one_that_image_spec_says(both):
    spec = both[0].image
    _, _, preprocess = open_clip.create_model_and_transforms(
        f"local-dir:{zoo.model_path('tiny-clip')}"
    )
    row = pq.read_table(zoo.data_path("clipart-animals", "val")).slice(0, 1).to_pylist()[0]
    image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
    squashed = image.resize((spec.size, spec.size), Image.Resampling.BICUBIC)
    expected = (torch.from_numpy(np.asarray(squashed).copy()).float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(preprocess(image), expected.permute(2, 0, 1), atol=1e-6, rtol=0)
    assert (spec.resize, spec.interpolation) == ("squash", "bicubic")


def test_both_tokenizers_give_the_same_ids(both):
    ours, theirs = both
    folder = str(zoo.model_path("tiny-clip"))
    stock = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    fast = CLIPTokenizer.from_pretrained(folder)(
        TEXTS, padding="max_length", truncation=True, max_length=32, return_tensors="pt"
    ).input_ids
    assert torch.equal(stock, fast)
    assert torch.equal(ours.tokenize(TEXTS)["input_ids"], stock)
    assert torch.equal(theirs.tokenize(TEXTS)["input_ids"], stock)
    end = json.loads((zoo.model_path("tiny-clip") / "vocab.json").read_text())["<|endoftext|>"]
    assert end == int(stock.max())
    assert ours.count_tokens("a red apple") == theirs.count_tokens("a red apple") == 5
    assert ours.count_tokens(TEXTS[4]) > 32
