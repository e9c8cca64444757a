"""Scores of given texts and written texts against the stock classes, for every family."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmtune.backbones.generation import Decoding, log_probabilities, texts_of
from mmtune.tuners import registry
from tests.backbones.writers import WRITERS, writer

QUESTIONS = ["w5 w9 w7 w8", "w6 w4", "w10 w11 w12"]
TARGETS = ["w20 w21", "w22", "w23 w24 w25", "w26"]
OWNER = torch.tensor([0, 2, 2, 1])
EVERY = pytest.mark.parametrize("name", WRITERS)


def filled(name, texts):
    placed = name in ("llava", "qwen2", "mistral", "minigpt4")
    return [f"w30 <image> {t}" for t in texts] if placed else texts


def pixels(count=3):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def batch_of(name, view, tokenizer, prompts=QUESTIONS, targets=TARGETS, owner=OWNER):
    return {
        "pixel_values": pixels(),
        **view.prompts(tokenizer, filled(name, prompts)),
        **view.targets(tokenizer, targets),
        "owner": owner,
    }


def likelihoods(view, model, batch):
    with torch.no_grad():
        logits = view.target_logits(model, batch)
    return log_probabilities(logits, batch["target_ids"], batch["target_mask"])


def stock_inputs(name, view, tokenizer, row):
    """The row's prompt and target as the stock class wants them in its own forward pass."""
    prompt = view.prompts(tokenizer, filled(name, [QUESTIONS[OWNER[row]]]))["input_ids"]
    target = view.targets(tokenizer, [TARGETS[row]])["target_ids"]
    inputs = {"pixel_values": pixels()[OWNER[row]][None]}
    if name == "blip-vqa":
        begin = torch.ones(1, 1, dtype=torch.int64)
        return inputs | {"input_ids": prompt, "labels": torch.cat([begin, target], 1)}
    if name == "blip2-t5":
        image = torch.full((1, 4), 59)
        return inputs | {"input_ids": torch.cat([image, prompt], 1), "labels": target}
    if name == "blip2-opt":
        prompt = torch.cat([torch.full((1, 4), 59), prompt], 1)
    ids = torch.cat([prompt, target], 1)
    return inputs | {"input_ids": ids, "labels": torch.cat([prompt.fill_(-100), target], 1)}


@EVERY
def test_likelihood_of_each_target_is_the_loss_of_the_stock_class(name):
    model, view, tokenizer = writer(name)
    found = likelihoods(view, model, batch_of(name, view, tokenizer))
    stock, view, tokenizer = writer(name, prepare=False)
    for row, text in enumerate(TARGETS):
        with torch.no_grad():
            want = stock(**stock_inputs(name, view, tokenizer, row)).loss
        count = len(text.split()) + 1
        torch.testing.assert_close(-found[row].sum() / count, want, rtol=2e-5, atol=2e-5)
        assert (found[row, count:] == 0).all()


@EVERY
def test_a_score_does_not_depend_on_the_batch(name):
    model, view, tokenizer = writer(name)
    together = likelihoods(view, model, batch_of(name, view, tokenizer))
    for row, text in enumerate(TARGETS):
        owner = int(OWNER[row])
        alone = batch_of(name, view, tokenizer, [QUESTIONS[owner]], [text], torch.tensor([0]))
        alone["pixel_values"] = alone["pixel_values"][owner][None]
        one = likelihoods(view, model, alone)[0]
        torch.testing.assert_close(together[row, : len(one)], one, rtol=1e-5, atol=2e-5)


@EVERY
def test_words_are_those_that_the_stock_class_writes(name):
    stock, view, tokenizer = writer(name, prepare=False)
    wanted = {"max_new_tokens": 6, "min_new_tokens": 2, "do_sample": False}
    wanted |= {"eos_token_id": view.ends}
    want = {}
    for beams in (1, 3):
        for row, text in enumerate(QUESTIONS):
            ids = view.prompts(tokenizer, filled(name, [text]))["input_ids"]
            if name == "blip-caption":  # which takes the last token of a prompt for its end
                ids = F.pad(ids, (0, 1), value=59)
            if name.startswith("blip2"):
                ids = F.pad(ids, (4, 0), value=59)
            if name.startswith("blip-"):
                call = {k: v for k, v in wanted.items() if k != "eos_token_id"}
            else:
                call = wanted
            image = pixels()[row][None]
            written = stock.generate(
                pixel_values=image,
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                num_beams=beams,
                **call,
            )[0]
            begun = {"blip-vqa": 1, "blip2-t5": 1, "blip-caption": ids.shape[1] - 1}
            want[beams, row] = written[begun.get(name, ids.shape[1]) :].tolist()
    model, view, tokenizer = writer(name)
    batch = batch_of(name, view, tokenizer)
    for beams in (1, 3):
        for cache in (True, False):
            decoding = Decoding(beams=beams, min_tokens=2, max_tokens=6, cache=cache)
            found = view.generate(model, batch, decoding)
            for row in range(3):
                theirs, ours = want[beams, row], found[row].tolist()
                assert ours[: len(theirs)] == theirs, (beams, cache, row)
                assert set(ours[len(theirs) :]) <= {0}
    assert len({tuple(w) for w in want.values()}) > 1


def test_decoding_stops_at_the_first_end():
    _, view, tokenizer = writer("llava")
    ids = torch.tensor([[5, 6, 2, 7, 0], [2, 5, 5, 5, 5], [9, 9, 9, 9, 9]])
    assert texts_of(tokenizer, ids, view.ends) == ["w5 w6", "", "w9 w9 w9 w9 w9"]


def test_targets_are_cut_before_their_end_token():
    _, view, tokenizer = writer("blip2-opt")
    found = view.targets(tokenizer, ["w5 w6 w7 w8", ""], limit=3)
    assert found["target_ids"].tolist() == [[5, 6, 2], [2, 0, 0]]
    assert found["target_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_llava_prompt_needs_a_place_for_its_image():
    _, view, tokenizer = writer("llava")
    with pytest.raises(ValueError, match="must hold <image> once"):
        view.prompts(tokenizer, ["w5 w6"])


@pytest.mark.parametrize("method", ["aurora", "lora", "prompt", "prefix"])
@pytest.mark.parametrize("name", ["blip-vqa", "blip-caption", "blip2-opt", "blip2-t5", "llava"])
def test_an_adapted_model_writes_what_it_scores_highest(name, method):
    model, view, tokenizer = writer(name)
    base = likelihoods(view, model, batch_of(name, view, tokenizer))
    settings = {"prompt": {"tokens": 2}, "prefix": {"tokens": 2}}.get(method, {})
    adapted = registry.apply(model, method, registry.method(method).options(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    batch = batch_of(name, view, tokenizer)
    changed = likelihoods(view, adapted, batch)
    assert (changed - base).abs().max() > 1e-4
    with adapted.disable_adapter():
        assert torch.equal(likelihoods(view, adapted, batch), base)
    decoding = Decoding(min_tokens=5, max_tokens=5)
    with torch.no_grad():
        words = view.generate(adapted, batch, decoding)
        slow = view.generate(adapted, batch, Decoding(min_tokens=5, max_tokens=5, cache=False))
        assert torch.equal(words, slow)
        own = {"target_ids": words, "target_mask": torch.ones_like(words)}
        logits = view.target_logits(adapted, batch | own | {"owner": torch.arange(3)})
    logits[:, :, view.ends] = -torch.inf  # which min_tokens forbids
    assert torch.equal(logits.argmax(-1), words)


@EVERY
def test_recomputed_activations_and_bf16_give_the_same_gradients(name):
    found = []
    for checkpoint in (False, True):
        model, view, tokenizer = writer(name)
        torch.manual_seed(0)
        settings = registry.method("lora").options()
        adapted = registry.apply(model, "lora", settings).train()
        view.set_gradient_checkpointing(checkpoint)
        batch = batch_of(name, view, tokenizer)
        logits = view.target_logits(adapted, batch)
        log_probabilities(logits, batch["target_ids"], batch["target_mask"]).sum().backward()
        found.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    assert max(float(g.abs().max()) for g in found[0].values()) > 1e-3
    for parameter, gradient in found[0].items():  # T5 adds those of its encoder in another order
        torch.testing.assert_close(found[1][parameter], gradient, rtol=1e-4, atol=1e-6)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    low = likelihoods(view, adapted.eval().bfloat16(), half)
    torch.testing.assert_close(low, likelihoods(view, adapted.float(), batch), rtol=0.1, atol=0.1)
    assert low.dtype == torch.float32


def test_frames_are_read_side_by_side():
    model, view, tokenizer = writer("blip-vqa")
    batch = batch_of("blip-vqa", view, tokenizer)
    one = likelihoods(view, model, batch)
    frames = batch["pixel_values"][:, None]
    assert torch.equal(likelihoods(view, model, batch | {"pixel_values": frames}), one)
    # Attention over states that are there twice is attention over those that are there once.
    twice = likelihoods(view, model, batch | {"pixel_values": frames.expand(-1, 2, -1, -1, -1)})
    torch.testing.assert_close(twice, one, rtol=1e-5, atol=1e-5)
    other = torch.cat([frames, frames.flip(0)], dim=1)
    assert (likelihoods(view, model, batch | {"pixel_values": other}) - one).abs().max() > 1e-3


def test_the_stock_class_overlooks_the_mask_again_once_it_is_restored():
    model, view, tokenizer = writer("blip-vqa", prepare=False)
    batch = batch_of("blip-vqa", view, tokenizer)
    inputs = {k: batch[k] for k in ("pixel_values", "input_ids", "attention_mask")}
    labels = torch.tensor([[1, 20, 59]] * 3)
    with torch.no_grad():
        want = model(**inputs, labels=labels).loss
        likelihoods(view, model, batch)
        heeded = model(**inputs, labels=labels).loss
        view.restore()
        assert torch.equal(model(**inputs, labels=labels).loss, want)
        view.prepare()
        torch.testing.assert_close(model(**inputs, labels=labels).loss, want)
    assert (heeded - want).abs() > 1e-3
