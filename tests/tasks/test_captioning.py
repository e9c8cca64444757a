"""Captioning: the loss over tokens, prompts, written captions, and what predictions look like."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mmtune.backbones.loading import hf_loaded
from mmtune.data import DataOptions, SourceOptions
from mmtune.runs import RunError, save_predictions
from mmtune.tasks import tasks
from mmtune.tasks.base import Evaluation
from mmtune.tasks.captioning import CaptioningOptions, CaptioningTask
from tests.backbones.writers import writer
from tests.tasks.shapes import caption_data, loaded
from tests.tasks.tiny import tiny_loaded

PLAIN = {"augment": None, "resamples": 100}


def make_task(folder, model=None, data=None, **options):
    options = {"prompt": "a picture of", **PLAIN, **options}
    data = data or caption_data(folder)
    return CaptioningTask(
        CaptioningOptions(**options), data, model or loaded("caption"), 0, progress=False
    )


def test_captions_are_learned_and_the_gallery_shows_it(tmp_path):
    assert tasks()["captioning"] is CaptioningTask
    task = make_task(tmp_path, captions="all")
    before = task.evaluate(task.loaded.model, progress=False)
    task.loaded.backbone.prepare()
    torch.manual_seed(0)
    model = get_peft_model(
        task.loaded.model, LoraConfig(target_modules="all-linear", r=8, lora_alpha=16)
    )
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    batch = task.collate([task.train_dataset[i] for i in range(32)])
    losses = []
    for _ in range(60):
        loss, _ = task.loss(model, batch)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5
    after = task.evaluate(model, progress=False)
    names = ["CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"]
    assert list(after.metrics) == names
    assert after.primary == "CIDEr"
    assert after.metrics["BLEU-1"].value > 80
    gain = task.compare(before, after)
    assert gain["CIDEr"].low > 0
    assert gain["CIDEr"].value == pytest.approx(
        after.metrics["CIDEr"].value - before.metrics["CIDEr"].value
    )
    items = task.gallery(before, after, limit=4)
    assert len(items) == 4
    assert all(item.query.image.size == (32, 32) for item in items)
    assert {item.after[0].text for item in items} <= {
        p["caption"] for p in after.details["predictions"]
    }
    file = tmp_path / "captions.json"
    assert save_predictions(after, file) == 16
    found = json.loads(file.read_text())
    assert found[0].keys() == {"image_id", "caption"}
    assert "picture" not in found[0]["caption"]  # the prompt is no part of what is written


def test_the_loss_is_that_of_the_stock_class_over_the_tokens_behind_the_prompt(tmp_path):
    task = make_task(tmp_path)
    with torch.no_grad():
        batch = task.collate([task.train_dataset[i] for i in range(6)])
        found, _ = task.loss(task.loaded.model, batch)
    total, tokens = 0.0, 0
    for i in range(6):
        pair = task.train_dataset[i]
        ids = task.loaded.tokenizer(f"a picture of {pair.caption}", return_tensors="pt").input_ids
        labels = ids.clone()
        labels[:, :4] = -100  # begin token and prompt
        with torch.no_grad():
            one = task.loaded.model(pair.pixels[None], input_ids=ids, labels=labels).loss
        total, tokens = total + float(one) * (ids.shape[1] - 4), tokens + ids.shape[1] - 4
    assert found.item() == pytest.approx(total / tokens, rel=1e-5)


def test_a_prompt_leaves_room_in_the_context(tmp_path):
    entries = [{"image": "large-red-circle.png", "caption": "the red circle " * 8}]
    caption_data(tmp_path)
    path = tmp_path / "long.json"
    path.write_text(json.dumps(entries))
    data = DataOptions(train=SourceOptions("blip", str(path)))
    task = make_task(tmp_path, data=data)
    assert task.truncated == 1
    batch = task.collate([task.train_dataset[0]])
    assert batch["input_ids"].shape[1] + batch["target_ids"].shape[1] == 10
    assert batch["target_ids"][0, -1] == 59
    loss, _ = task.loss(task.loaded.model, batch)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "llava"])
def test_multimodal_language_models_describe(name, tmp_path):
    model, _, tokenizer = writer(name)
    known = hf_loaded(model, tokenizer, loaded().image, name)
    entries = [
        {"image": f"large-{c}-circle.png", "caption": [f"w{3 + i} w9 w4", f"w{3 + i}"]}
        for i, c in enumerate(("red", "green", "blue"))
    ]
    caption_data(tmp_path)
    path = tmp_path / "words.json"
    path.write_text(json.dumps(entries))
    source = SourceOptions("blip", str(path))
    data = DataOptions(train=source, test=source)
    prompt = "<image> w5" if name == "llava" else ""
    task = make_task(tmp_path, known, data, prompt=prompt, max_tokens=4)
    loss, _ = task.loss(model, task.collate([task.train_dataset[i] for i in range(3)]))
    assert torch.isfinite(loss)
    found = task.evaluate(model, progress=False)
    assert all(len(p["caption"].split()) <= 4 for p in found.details["predictions"])


def test_lengths_are_respected(tmp_path):
    task = make_task(tmp_path, min_tokens=5, max_tokens=5, beams=1)
    found = task.evaluate(task.loaded.model, progress=False)
    words = [len(p["caption"].split()) for p in found.details["predictions"]]
    assert max(words) <= 5
    with pytest.raises(ValueError, match="must not be above max_tokens"):
        CaptioningOptions(min_tokens=9, max_tokens=3)


def test_models_that_do_not_write_are_refused(tmp_path):
    with pytest.raises(ValueError, match="task captioning needs a model that writes text"):
        make_task(tmp_path, tiny_loaded())


def test_a_task_without_predictions_says_so(tmp_path):
    with pytest.raises(RunError, match="makes no predictions"):
        save_predictions(Evaluation({}, "mean"), tmp_path / "x.json")
