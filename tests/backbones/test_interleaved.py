"""Models whose image stands among the words: MiniGPT-4, LLaVA-OneVision, Qwen-VL."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BlipImageProcessor,
    LlavaOnevisionImageProcessorPil,
    Qwen2VLImageProcessorPil,
)

from mmtune.backbones import SiteError, backbone_of
from mmtune.backbones.base import ImageSpec
from mmtune.backbones.generation import Decoding, log_probabilities
from mmtune.backbones.loading import hf_loaded
from mmtune.conformance.backbones import build
from mmtune.conformance.mllms import PINPOINTS
from mmtune.data.transforms import EvalTransform

from . import mllm_checks as checks
from .writers import writer

QWENS = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")
SIZED = ("llava-onevision", *QWENS)
EVERY = pytest.mark.parametrize("name", ["minigpt4", *SIZED])
ROLES = ["q", "k", "v", "out", "fc1", "fc2"]


def processor(name):
    if name == "llava-onevision":
        size = {"height": 32, "width": 32}
        return LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=PINPOINTS)
    size = {"shortest_edge": 64, "longest_edge": 128 * 128}
    return Qwen2VLImageProcessorPil(patch_size=4, size=size)


def image(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@EVERY
def test_prepared_computes_what_stock_computes_and_is_restored(name):
    checks.computes_what_stock_computes(name)
    checks.restores_exactly(name)


@EVERY
def test_every_branch_has_its_parts(name):
    _, _, view = checks.stock_and_prepared(name)
    checks.sites_are_where_they_say(view)
    counts = Counter((s.branch, s.role) for s in view.sites())
    for branch in ("vision", "language"):
        assert all(counts[branch, role] == 2 for role in (*ROLES, "layer", "attention", "mlp"))
        assert counts[branch, "embed"] == 1
    assert counts["language", "gate"] == 2
    assert counts["vision", "gate"] == (2 if name == "qwen2.5-vl" else 0)
    heads = {"minigpt4": 1, "qwen3-vl": 4}
    assert counts["projector", "head"] == heads.get(name, 2)
    assert view.select(["language"], ["head"])[0].path.endswith("lm_head")


@pytest.mark.parametrize("name", QWENS)
def test_unprepared_models_are_told(name):
    with pytest.raises(SiteError, match="prepare"):
        backbone_of(build(name)).sites()


@EVERY
@pytest.mark.parametrize("branch", ["vision", "projector", "language"])
def test_every_branch_is_adapted_disabled_and_merged(name, branch):
    roles = ["head"] if branch == "projector" else ROLES
    checks.adapts_and_merges(name, "lora", branch, roles)


@EVERY
def test_virtual_words_are_real_words(name):
    checks.virtual_words_are_real_words(name)


@EVERY
def test_cached_decoding_equals_uncached_with_virtual_tokens(name):
    checks.caches_virtual_tokens(name)


@EVERY
def test_padding_does_not_reach_virtual_tokens(name):
    checks.padding_does_not_reach_virtual_tokens(name)


@EVERY
def test_gradient_checkpointing_reaches_every_layer(name):
    _, _, view = checks.stock_and_prepared(name)
    layers = [s.module for s in view.select(None, ["layer"])]
    assert view.set_gradient_checkpointing()
    assert all(layer.gradient_checkpointing for layer in layers)
    view.set_gradient_checkpointing(False)
    assert not any(layer.gradient_checkpointing for layer in layers)


@EVERY
def test_loaded_by_name(name, tmp_path):
    if name == "minigpt4":
        loaded = checks.loads_by_name(
            name, tmp_path, BlipImageProcessor(size={"height": 32, "width": 32})
        )
        assert (loaded.image.size, loaded.image.resize, loaded.processor) == (32, "squash", None)
        return
    loaded = checks.loads_by_name(name, tmp_path, processor(name))
    side = 32 if name == "llava-onevision" else 128
    assert (loaded.image.size, loaded.image.resize) == (side, "squash")
    want = loaded.backbone.pixels(processor(name), [image(20, 44)])
    found = loaded.backbone.pixels(loaded.processor, [image(20, 44)])
    assert all(torch.equal(found[key], want[key]) for key in want)


@pytest.mark.parametrize("name", SIZED)
@torch.no_grad()
def test_a_square_is_read_as_the_stock_processor_gives_it(name):
    model, view, tokenizer = writer(name)
    side = 32 if name == "llava-onevision" else view.square
    stock = processor(name)
    spec = ImageSpec(side, tuple(stock.image_mean), tuple(stock.image_std))
    square = EvalTransform(spec)(image(side, side))[None]
    given = view.pixels(stock, [image(side, side)])
    want = view.image_tokens(model, **given)[0]
    found = view.image_tokens(model, square)[0]
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert view.counts(None, 1) == view.counts(given["image_sizes"], 1) == [len(want)]
    prompts = view.prompts(tokenizer, ["w5 <image> w6"])
    sized = view.prompts(tokenizer, ["w5 <image> w6"], sizes=given["image_sizes"])
    assert torch.equal(prompts["input_ids"], sized["input_ids"])
    first, second = (
        view.read(model, p, **t) for p, t in ((square, prompts), given_with(given, sized))
    )
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-4, atol=1e-5)


def given_with(given, prompts):
    return given["pixel_values"], prompts


def test_squares_that_would_be_enlarged_are_refused():
    model = build("llava-onevision")
    model.config.image_grid_pinpoints = [[64, 64]]
    with pytest.raises(ValueError, match=r"lack \[32, 32\]"):
        backbone_of(model).counts(None, 1)


@pytest.mark.parametrize("name", SIZED)
@torch.no_grad()
def test_words_are_those_that_the_stock_class_writes(name):
    """One by one without padding, and of a batch of images of several sizes, with beams."""
    texts, sizes = (
        ["w5 <image> w9 w7", "<image> w6", "w4 w8 <image> w3 w2"],
        [(32, 32), (20, 44), (25, 21)],
    )
    images = [image(*size, seed=i) for i, size in enumerate(sizes)]
    stock, view, tokenizer = writer(name, prepare=False)
    wanted = {"max_new_tokens": 6, "min_new_tokens": 2, "do_sample": False}
    wanted |= {"eos_token_id": view.ends}
    want = {}
    for row, text in enumerate(texts):
        given = dict(processor(name)(images=[images[row]], return_tensors="pt"))
        given.pop("batch_num_images", None)
        prompts = view.prompts(
            tokenizer, [text], sizes=view.pixels(processor(name), [images[row]])["image_sizes"]
        )
        ids = prompts["input_ids"]
        if "image_grid_thw" in given:
            given["mm_token_type_ids"] = (ids == 59).int()
        for beams in (1, 3):
            written = stock.generate(
                **given,
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                num_beams=beams,
                **wanted,
            )
            want[beams, row] = written[0, ids.shape[1] :].tolist()
    model, view, tokenizer = writer(name)
    seen = view.pixels(processor(name), images)
    batch = {**view.prompts(tokenizer, texts, sizes=seen["image_sizes"]), **seen}
    for beams in (1, 3):
        for cache in (True, False):
            decoding = Decoding(beams=beams, min_tokens=2, max_tokens=6, cache=cache)
            found = view.generate(model, batch, decoding)
            for row in range(3):
                theirs, ours = want[beams, row], found[row].tolist()
                assert ours[: len(theirs)] == theirs, (beams, cache, row)
    assert getattr(model.model, "rope_deltas", None) is None  # generate left nothing behind
    targets = view.targets(tokenizer, ["w20 w21", "w22"])
    full = {**batch, **targets, "owner": torch.tensor([2, 0])}
    scores = view.target_logits(model, full)
    logs = log_probabilities(scores, targets["target_ids"], targets["target_mask"])
    assert logs.shape == (2, 3)
    assert (logs[targets["target_mask"] == 1] < 0).all()


@pytest.mark.parametrize("name", ["minigpt4", "qwen3-vl"])
def test_prompts_and_images_that_do_not_fit_are_told(name):
    model, view, tokenizer = writer(name)
    with pytest.raises(ValueError, match="must hold <image> once"):
        view.prompts(tokenizer, ["w5"])
    with pytest.raises(ValueError, match="must hold no <image>"):
        view.text_prompts(tokenizer, ["w5 <image>"])
    prompts = view.prompts(tokenizer, ["<image> w5"])
    side = 32 if name == "minigpt4" else view.square
    short = {key: value[:, 3:] for key, value in prompts.items()}
    with pytest.raises(ValueError, match=r"placeholders and the images \d+ tokens"):
        view.read(model, torch.zeros(1, 3, side, side), **short)


def test_only_families_that_read_sizes_keep_a_processor():
    model, _, tokenizer = writer("minigpt4")
    spec = ImageSpec(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert hf_loaded(model, tokenizer, spec, "x", object()).processor is None
    with pytest.raises(TypeError, match="reads square images alone"):
        backbone_of(model).pixels(None, [])
