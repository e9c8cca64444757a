from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mmtune.data import DataError, DataOptions
from mmtune.data.transforms import AugmentOptions
from mmtune.tasks import tasks
from mmtune.tasks.retrieval import RetrievalOptions, RetrievalTask
from tests.tasks.tiny import LENGTH, colour_data, tiny_loaded

PLAIN = RetrievalOptions(augment=None, resamples=100)


def make_task(folder, options=PLAIN, captions=None, seed=0):
    loaded = tiny_loaded()
    return RetrievalTask(options, colour_data(folder, captions), loaded, seed, progress=False)


def batch_of(task, indices):
    return task.collate([task.train_dataset[i] for i in indices])


def trained(task, steps=60):
    model = get_peft_model(
        task.loaded.model, LoraConfig(target_modules=["q_proj", "v_proj", "fc1", "fc2"], r=8)
    )
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for step in range(steps):
        task.set_epoch(step)
        loss, _ = task.loss(model, batch_of(task, range(8)))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return model, losses


def test_it_is_found_by_name():
    assert tasks()["retrieval"] is RetrievalTask
    assert RetrievalTask.options is RetrievalOptions


def test_training_raises_recall_and_the_gallery_shows_it(tmp_path):
    task = make_task(tmp_path)
    before = task.evaluate(task.loaded.model, progress=False)
    model, losses = trained(task)
    assert losses[-1] < losses[0] / 2
    model.train()
    after = task.evaluate(model, progress=False)
    assert model.training
    assert model.base_model.model.text_model.training
    names = [f"{d} R@{k}" for d in ("txt2img", "img2txt") for k in (1, 5, 10)]
    assert list(after.metrics) == [
        *names,
        "mean R@1",
        "mean",
        "RSum",
        "txt2img MdR",
        "img2txt MdR",
    ]
    assert after.primary == "mean"
    assert after.metrics["txt2img R@1"].n == 16
    assert after.metrics["img2txt R@1"].n == 8
    gain = task.compare(before, after)["txt2img R@1"]
    assert gain.value == pytest.approx(
        after.metrics["txt2img R@1"].value - before.metrics["txt2img R@1"].value
    )
    assert gain.low > 0

    shown = task.gallery(before, after, limit=6)
    assert 0 < len(shown) <= 6
    assert {item.query.image is None for item in shown} == {True, False}
    for item in shown:
        assert len(item.before) == len(item.after) == 3
        assert {cell.correct for cell in item.before + item.after} <= {True, False}
    first = shown[0]
    assert not any(c.correct for c in first.before)
    assert any(c.correct for c in first.after)
    # Read backwards, every gain is a loss.
    losses = task.gallery(after, before, limit=6)
    assert all(any(c.correct for c in item.before) for item in losses[:1])


def test_gallery_shows_gains_first_and_both_kinds(tmp_path):
    task = make_task(tmp_path)
    one = task.evaluate(tiny_loaded(1).model, progress=False)
    two = task.evaluate(tiny_loaded(2).model, progress=False)

    def moves(items):
        parts = [i.title.rpartition("rank ")[2].split(" → ") for i in items]
        return [float(a) - float(b) for a, b in parts]

    moved = moves(task.gallery(one, two, limit=6))
    assert max(moved) > 0 > min(moved)
    assert [m > 0 for m in moved] == sorted((m > 0 for m in moved), reverse=True)
    assert len(moved) == 6
    assert task.gallery(one, one) == []


def test_correct_flags_follow_the_right_answers(tmp_path):
    task = make_task(tmp_path)
    one = task.evaluate(tiny_loaded(1).model, progress=False)
    two = task.evaluate(tiny_loaded(2).model, progress=False)
    for item in task.gallery(one, two, limit=30):
        for cell in item.before + item.after:
            if item.query.image is None:
                own = task.splits["test"].records
                record = next(r for r in own if item.query.text in r.captions)
                assert cell.correct == (cell.text == record.captions[0])
                assert max(cell.image.size) <= 160
            else:
                colour, shade = item.query.text.split()[2], item.query.text.split()[1]
                assert cell.correct == (colour in cell.text and shade in cell.text)


def test_evaluation_of_chunks_and_of_an_untrained_adapter_is_that_of_the_model(tmp_path):
    task = make_task(tmp_path)
    whole = task.evaluate(task.loaded.model, progress=False)
    small = RetrievalTask(
        RetrievalOptions(augment=None, resamples=100, eval_batch_size=3),
        colour_data(tmp_path),
        task.loaded,
        0,
        progress=False,
    ).evaluate(task.loaded.model, progress=False)
    assert whole.metrics == small.metrics
    model = get_peft_model(task.loaded.model, LoraConfig(target_modules=["q_proj"], r=2))
    assert task.evaluate(model, progress=False).metrics == whole.metrics


def test_evaluate_keeps_the_mode_of_every_module(tmp_path):
    task = make_task(tmp_path)
    model = task.loaded.model.train()
    model.vision_model.eval()
    modes = [m.training for m in model.modules()]
    task.evaluate(model, progress=False)
    assert [m.training for m in model.modules()] == modes


def test_identical_captions_count_as_positives_unless_distinct(tmp_path):
    def captions(name):
        return ["A square. "] if "red" in name else ["a  SQUARE"] if "blue" in name else [name]

    for identical, expected in (("positive", 4), ("distinct", 1)):
        task = make_task(
            tmp_path, RetrievalOptions(identical=identical, augment=None, resamples=100), captions
        )
        gallery = task.gallery_of("test")
        number = gallery.captions.index("A square.")
        assert len(gallery.images_of[number]) == expected
        assert len(gallery.captions_of[gallery.owner[number]]) == expected
        batch = batch_of(task, range(8))
        embedded = task.loaded.backbone.embed_pairs(task.loaded.model, batch)
        same = (batch["groups"][:, None] == batch["groups"][None]).any(2)
        assert same.sum() == 4 + 4 * 4
        from mmtune.tasks.losses import clip_loss

        groups = batch["groups"] if identical == "positive" else None
        loss = clip_loss(embedded.image, embedded.text, embedded.scale, groups)
        assert task.loss(task.loaded.model, batch)[0].item() == pytest.approx(loss.item())


def test_captions_take_turns_and_depend_on_the_epoch_only(tmp_path):
    task = make_task(tmp_path)
    again = make_task(tmp_path)
    assert len(task.train_dataset) == 8
    seen = []
    for epoch in range(2):
        task.set_epoch(epoch)
        seen.append([task.train_dataset[i].caption for i in range(8)])
    for i, record in enumerate(task.splits["train"].records):
        assert {seen[0][i], seen[1][i]} == set(record.captions)
    again.set_epoch(1)
    assert [again.train_dataset[i].caption for i in reversed(range(8))] == seen[1][::-1]
    every = make_task(tmp_path, RetrievalOptions(captions="all", augment=None))
    captions = [every.train_dataset[i].caption for i in range(len(every.train_dataset))]
    assert captions == [c for r in every.splits["train"].records for c in r.captions]


def test_augmented_batches_are_reproducible_with_workers(tmp_path):
    options = RetrievalOptions(augment=AugmentOptions(scale=(0.3, 1), brightness=0.3))
    task = make_task(tmp_path, options)

    def pixels(workers, epoch):
        task.set_epoch(epoch)
        loader = torch.utils.data.DataLoader(
            task.train_dataset, 4, num_workers=workers, collate_fn=task.collate
        )
        return torch.cat([b["pixel_values"] for b in loader])

    assert torch.equal(pixels(0, 1), pixels(2, 1))
    assert not torch.equal(pixels(0, 1), pixels(0, 2))


def test_too_long_captions_are_counted_once(tmp_path, caplog):
    long = "one two three four five six seven eight nine"

    def captions(name):
        return [long if "grey" in name else name, "short"]

    with caplog.at_level(logging.WARNING):
        task = make_task(tmp_path, captions=captions)
    assert task.truncated == 4  # two images, in train and in test
    messages = [r.getMessage() for r in caplog.records if "longer than" in r.getMessage()]
    assert len(messages) == 1
    assert f"4 of 32 texts are longer than the {LENGTH} tokens" in messages[0]
    assert "The longest has 11 tokens" in messages[0]
    batch = task.collate([task.train_dataset[i] for i in range(8)])
    assert batch["input_ids"].shape[1] <= LENGTH


def test_temperature_is_frozen_unless_asked_for(tmp_path):
    task = make_task(tmp_path)
    model = task.loaded.model
    loss, _ = task.loss(model, batch_of(task, range(8)))
    loss.backward()
    assert model.logit_scale.grad is None
    free = make_task(tmp_path, RetrievalOptions(train_logit_scale=True, augment=None))
    wrapped = get_peft_model(free.loaded.model, LoraConfig(target_modules=["q_proj"], r=2)).train()
    with pytest.raises(ValueError, match="logit_scale is frozen"):
        free.loss(wrapped, batch_of(free, range(8)))
    free.before_training(wrapped)
    loss, _ = free.loss(wrapped, batch_of(free, range(8)))
    loss.backward()
    assert free.loaded.model.logit_scale.grad.abs() > 0


def test_sigmoid_on_a_model_without_bias_takes_the_option(tmp_path):
    losses = []
    for bias in (-10.0, 0.0):
        options = RetrievalOptions(loss="sigmoid", sigmoid_bias=bias, augment=None)
        task = make_task(tmp_path, options)
        losses.append(task.loss(task.loaded.model, batch_of(task, range(8)))[0].item())
    assert losses[0] != losses[1]


def test_missing_splits_are_named(tmp_path):
    task = make_task(tmp_path)
    with pytest.raises(DataError, match=r"data.val is not set: there are: train, test"):
        task.evaluate(task.loaded.model, "val")
    data = DataOptions(test=colour_data(tmp_path).test)
    only_test = RetrievalTask(PLAIN, data, tiny_loaded(), 0, progress=False)
    assert only_test.evaluate(only_test.loaded.model, progress=False).metrics
    with pytest.raises(DataError, match=r"data.train is not set"):
        len(only_test.train_dataset)
    assert only_test.data_files == [str(tmp_path / "data.json")]


def test_evaluations_of_other_splits_are_not_compared(tmp_path):
    task = make_task(tmp_path)
    test = task.evaluate(task.loaded.model, progress=False)
    train = task.evaluate(task.loaded.model, "train", progress=False)
    with pytest.raises(ValueError, match="two evaluations of one split"):
        task.compare(test, train)


def test_half_precision_weights_are_fed_their_own_dtype(tmp_path):
    task = make_task(tmp_path)
    task.loaded.model.to(torch.bfloat16)
    assert task.evaluate(task.loaded.model, progress=False).metrics["RSum"].value > 0
    loss, _ = task.loss(task.loaded.model, batch_of(task, range(8)))
    assert loss.dtype == torch.float32
