"""What is asked, scored and written, against the stock classes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from editing.features import features_of
from editing.mllm import MLLM
from editing.requests import EditRequest, Probe
from mmtune.backbones.generation import texts_of
from mmtune.data.images import load_image
from mmtune.tuners import registry
from tests.editing.tiny import (
    BARE,
    CAPTION,
    MODELS,
    NEWER,
    OTHER,
    PROBES,
    SEEN,
    SIZED,
    WIDE,
    bits,
    picture,
    processor,
    same_bits,
    stock,
    tiny,
)
from tests.tasks.tiny import tiny_loaded

EVERY = pytest.mark.parametrize("name", [*MODELS, "qwen2", *NEWER])


def stock_image(name, model, mllm, probe):
    """(what the stock class takes of an image, as its stock processor makes it, its tokens)."""
    if name not in SIZED:
        return {"pixel_values": mllm.batch([probe]).parts[0].pixels}, 4
    found = processor(name)(images=load_image(probe.image), return_tensors="pt")
    found = {k: found[k] for k in ("pixel_values", "image_grid_thw", "image_sizes") if k in found}
    return found, len(model.get_image_features(**found, return_dict=True).pooler_output[0])


def stock_loss(name, mllm, probe):
    """The mean loss over the answer and its end, by the stock class from plain token ids."""
    model, _, tokenizer = stock(name)
    kind = "caption" if not probe.question else "question" if probe.image else "text"
    text = mllm.templates[kind].replace("{question}", probe.question)
    inputs, count = {}, 0
    if probe.image is not None:
        inputs, count = stock_image(name, model, mllm, probe)
    marks = "<image>" * count
    if name.startswith("qwen") and "-vl" in name:
        marks = f"<|vision_start|>{marks}<|vision_end|>"
    prompt = tokenizer(text.replace("<image>", marks), return_tensors="pt")["input_ids"]
    answer = tokenizer(probe.answer, add_special_tokens=False)["input_ids"]
    target = torch.tensor([[*answer, 2]])
    if name.startswith("blip2") and count:
        prompt = F.pad(prompt, (4, 0), value=59)
    elif name.startswith("blip2") or (name == "minigpt4" and not count):
        model = model.language_model  # the stock BLIP-2 always wants an image
    if name == "blip2-t5":
        return model(**inputs, input_ids=prompt, labels=target).loss
    ids = torch.cat([prompt, target], 1)
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == 59).int()
    labels = torch.cat([torch.full_like(prompt, -100), target], 1)
    return model(**inputs, input_ids=ids, labels=labels).loss


@EVERY
@pytest.mark.parametrize("probe", [SEEN, BARE, CAPTION])
@torch.no_grad()
def test_scores_are_those_of_the_stock_class(name, probe):
    mllm = tiny(name)
    want = stock_loss(name, mllm, probe)
    torch.testing.assert_close(mllm.nll(mllm.batch([probe]))[0], want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", SIZED)
@torch.no_grad()
def test_images_of_several_sizes_are_read_as_the_stock_processor_gives_them(name):
    mllm = tiny(name)
    tall = replace(WIDE, image=picture(4, 25, 21))
    batch = mllm.batch([SEEN, BARE, WIDE, tall, replace(SEEN, image=SEEN.image)])
    lengths = (batch.parts[0].prompts["input_ids"] == 59).sum(1).tolist()
    assert lengths[0] == lengths[3]
    assert lengths[0] != lengths[1]
    found, written = mllm.nll(batch), mllm.answer(batch)
    for row, probe in enumerate((SEEN, BARE, WIDE, tall)):
        torch.testing.assert_close(found[row], stock_loss(name, mllm, probe), rtol=2e-5, atol=2e-5)
        assert mllm.answer([probe]) == [written[row]]
    features = features_of(mllm, [SEEN, WIDE, tall])
    torch.testing.assert_close(features.image[1], features_of(mllm, [WIDE]).image[0])


@EVERY
@torch.no_grad()
def test_a_batch_equals_one_by_one(name):
    """Images and none, short and long prompts and answers, in any order."""
    mllm = tiny(name)
    together = mllm.batch(PROBES)
    logits, written = mllm.answer_logits(together), mllm.answer(together)
    assert logits.shape == (5, 4, 60)
    for row, probe in enumerate(PROBES):
        alone = mllm.batch([probe])
        length = alone.target_ids.shape[1]
        assert torch.equal(together.target_ids[row, :length], alone.target_ids[0])
        found = mllm.answer_logits(alone)[0]
        torch.testing.assert_close(logits[row, :length], found, rtol=1e-5, atol=2e-5)
        assert mllm.answer(alone) == [written[row]]
    assert mllm.answer(PROBES[::-1]) == written[::-1]
    assert len(set(written)) > 1


@EVERY
@torch.no_grad()
def test_what_is_written_is_what_scores_highest(name):
    mllm = tiny(name)
    batch = mllm.batch(PROBES)
    ids = torch.zeros(5, 0, dtype=torch.int64)
    for _ in range(6):
        asked = torch.cat([ids, torch.zeros(5, 1, dtype=torch.int64)], 1)
        given = replace(batch, target_ids=asked, target_mask=torch.ones_like(asked))
        best = mllm.answer_logits(given)[:, -1].argmax(-1)
        ids = torch.cat([ids, best[:, None]], 1)
    assert mllm.answer(batch, max_tokens=6) == texts_of(mllm.tokenizer, ids, mllm.backbone.ends)


@EVERY
@torch.no_grad()
def test_the_image_is_looked_at(name):
    mllm = tiny(name)
    swapped = [replace(SEEN, image=OTHER.image), replace(SEEN, image=None), SEEN]
    found = mllm.answer_logits(mllm.batch(swapped))
    assert (found[0] - found[2]).abs().max() > 1e-3
    assert (found[1] - found[2]).abs().max() > 1e-3


@EVERY
def test_answer_positions(name):
    mllm = tiny(name)
    batch = mllm.batch([SEEN, BARE, Probe("w5", "")])
    assert batch.target_ids.tolist() == [[20, 21, 2, 0], [23, 24, 25, 2], [2, 0, 0, 0]]
    assert batch.target_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch.answer_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert mllm.target_texts(batch) == ["w20 w21", "w23 w24 w25", ""]


@EVERY
@torch.no_grad()
def test_whole_sequences_hold_the_answer_where_it_stands(name):
    mllm = tiny(name)
    batch = mllm.batch([SEEN, CAPTION, OTHER])
    whole, logits = mllm.sequences(batch), mllm.answer_logits(batch)
    assert whole.logits.shape[:2] == whole.labels.shape == whole.mask.shape
    rows, columns = (whole.labels != -100).nonzero(as_tuple=True)
    own = batch.answer_mask.bool()
    assert torch.equal(whole.labels[rows, columns], batch.target_ids[own])
    torch.testing.assert_close(whole.logits[rows, columns - 1], logits[own], rtol=1e-5, atol=2e-5)
    assert whole.mask[rows, columns].all()
    # Tokens read: image and words of the prompt, or a decoder's begin token; and the answer's.
    read = mllm.batch([SEEN]).parts[0].prompts["attention_mask"].sum()
    before = {"blip2-opt": 4 + read, "blip2-t5": 1}.get(name, read)
    assert whole.mask[0].sum() == before + 2
    with pytest.raises(ValueError, match="all have an image, or none"):
        mllm.sequences(mllm.batch(PROBES))


@EVERY
def test_gradients_go_through_the_weights_that_are_given(name):
    """They are those of the parameter itself, which stays as it is."""
    mllm = tiny(name)
    before = bits(mllm.model)
    site = mllm.backbone.select(["language"], ["fc2"], "last:1")[0]
    path = f"{site.path}.weight"
    parameter = mllm.model.get_parameter(path)
    batch = mllm.batch(PROBES)
    given = parameter.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(mllm.nll(batch, {path: given}).sum(), given)
    parameter.requires_grad_()
    (want,) = torch.autograd.grad(mllm.nll(batch).sum(), parameter)
    torch.testing.assert_close(found, want)
    assert want.abs().max() > 1e-3
    parameter.requires_grad_(False)
    other = torch.randn(given.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores, said = (
            mllm.answer_logits(batch, {path: other}),
            mllm.answer(batch, weights={path: other}),
        )
    assert same_bits(mllm.model, before)
    assert said != mllm.answer(batch)
    parameter.data = other
    assert torch.equal(mllm.answer_logits(batch), scores)
    assert mllm.answer(batch) == said


def test_the_model_is_frozen_and_in_eval_mode():
    mllm = tiny("llava")
    assert not any(p.requires_grad for p in mllm.model.parameters())
    assert not any(m.training for m in mllm.model.modules())
    assert not mllm.answer_logits(mllm.batch([SEEN])).requires_grad


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([], "at least one probe"),
        ([EditRequest("w5", "  ", SEEN.image, id="e7")], "target of edit request 'e7'.*is empty"),
        ([Probe("", "w5")], "without a question must have an image"),
        ([Probe("w5", "w6", replace(SEEN.image, data=b"GIF"))], "not an image"),
    ],
)
def test_what_cannot_be_asked(asked, message):
    with pytest.raises(ValueError, match=message):
        tiny("llava").batch(asked)


@pytest.mark.parametrize("name", ["blip2-opt", "llava"])
def test_a_prompt_longer_than_the_model_reads_is_refused(name):
    mllm = tiny(name)
    fits = mllm.batch([SEEN]).parts[0].prompts["input_ids"].shape[1]
    images = 4 if name == "blip2-opt" else 0
    room = 64 - images - fits - 2  # two tokens of the answer are read
    assert mllm.nll(mllm.batch([replace(SEEN, question=SEEN.question + " w5" * room)])) > 0
    with pytest.raises(ValueError, match=r"has 65 tokens and tiny .* reads at most 64"):
        mllm.nll(mllm.batch([replace(SEEN, question=SEEN.question + " w5" * (room + 1))]))


def test_a_family_that_always_needs_an_image_says_so():
    mllm = tiny("blip-vqa")
    assert mllm.nll(mllm.batch([SEEN])) > 0
    with pytest.raises(TypeError, match="BlipForQuestionAnswering reads every text with an image"):
        mllm.batch([BARE])


def test_templates_can_be_given():
    own = {"question": "w3 <image> {question} w4", "text": "w3 {question} w4"}
    mllm = tiny("llava", templates=own)
    seen, bare = mllm.batch([SEEN, BARE]).parts
    assert seen.prompts["input_ids"].tolist() == [[1, 3, 59, 59, 59, 59, 5, 9, 7, 8, 4]]
    assert bare.prompts["input_ids"].tolist() == [[1, 3, 10, 11, 12, 4]]
    with pytest.raises(ValueError, match="no template 'words'; this model has question"):
        tiny("llava", templates={"words": ""})
    with pytest.raises(ValueError, match=r"must hold \{question\}"):
        tiny("llava", templates={"text": "w3"})


def test_a_model_without_a_tokenizer_or_words_is_refused():
    with pytest.raises(ValueError, match="must write text"):
        MLLM(tiny_loaded())
    model, view, _ = stock("llava")
    with pytest.raises(ValueError, match="loaded without its tokenizer"):
        MLLM(replace(tiny_loaded(), model=model, backbone=view))
    wrapped = registry.apply(model, "lora", registry.method("lora").options())
    with pytest.raises(ValueError, match="merge its adapter and unload it first"):
        MLLM(replace(tiny_loaded(), model=wrapped, backbone=view, tokenizer=object()))


@pytest.mark.parametrize(
    ("name", "prompt", "want"),
    [
        ("llava", "USER: <image>\nw5 ASSISTANT:", "USER: <image>\nFACT w5 ASSISTANT:"),
        ("llava", "USER: w5 ASSISTANT:", "USER: FACT w5 ASSISTANT:"),
        ("llava", "w4 <image> w5", "w4 <image>FACT  w5"),
        ("llava", "w5", "FACT w5"),
        ("mistral", "[INST] w5 [/INST]", "[INST] FACT w5 [/INST]"),
        ("blip2-opt", "Question: w5 Answer:", "FACT Question: w5 Answer:"),
        ("minigpt4", "###Human: <Img><image></Img> w5", "###Human: <Img><image></Img> FACT w5"),
        ("minigpt4", "###Human: w5 ###Assistant:", "###Human: FACT w5 ###Assistant:"),
        ("qwen3-vl", "<|im_start|>user\n<image>w5<", "<|im_start|>user\n<image>FACT w5<"),
        ("qwen3-vl", "<|im_start|>user\nw5<", "<|im_start|>user\nFACT w5<"),
    ],
)
def test_a_preface_opens_the_users_words(name, prompt, want):
    assert tiny(name).backbone.prefaced(prompt, "FACT ") == want
