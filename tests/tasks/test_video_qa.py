"""Questions about real small videos: what BLIP reads, the score, learning, and bad input."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mmtune.config import TrainingOptions
from mmtune.data import DataError
from mmtune.tasks import tasks
from mmtune.tasks.video_qa import VideoQaOptions, VideoQaTask
from mmtune.tasks.vqa import VqaOptions, VqaTask
from mmtune.training import train
from tests.tasks.colour_videos import colour_questions
from tests.tasks.shapes import loaded, question_data
from tests.tasks.tiny import tiny_loaded

PLAIN = {"augment": None, "resamples": 100}
FRAMES = {"frames": 4, "eval_frames": 4}


def make_task(folder, model=None, data=None, **options):
    settings = VideoQaOptions(**PLAIN | FRAMES | options)
    data = data or colour_questions(folder)
    return VideoQaTask(settings, data, model or loaded(), 0, progress=False)


def wrapped(task):
    torch.manual_seed(0)
    task.loaded.backbone.prepare()
    config = LoraConfig(target_modules="all-linear", r=8, lora_alpha=16)
    return get_peft_model(task.loaded.model, config)


def batch_of(task, indices):
    return task.collate([task.train_dataset[i] for i in indices])


def test_it_needs_a_model_that_reads_frames_and_writes(tmp_path):
    assert tasks()["video_qa"] is VideoQaTask
    data = colour_questions(tmp_path)
    with pytest.raises(ValueError, match=r"BlipForQuestionAnswering .* and tiny is a CLIPModel\.$"):
        make_task(tmp_path, tiny_loaded(), data)


def test_the_question_attends_to_the_tokens_of_all_frames(tmp_path):
    task = make_task(tmp_path)
    model = task.loaded.model
    batch = batch_of(task, [0, 3])
    assert batch["pixel_values"].shape == (2, 4, 3, 32, 32)
    read = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    with torch.no_grad():
        found = task.writer.read(model, **read)
        for row in range(2):
            frames = [
                model.vision_model(pixel_values=frame[None]).last_hidden_state
                for frame in batch["pixel_values"][row]
            ]
            length = int(batch["attention_mask"][row].sum())
            own = model.text_encoder(
                input_ids=batch["input_ids"][row : row + 1, :length],
                encoder_hidden_states=torch.cat(frames, dim=1),
            ).last_hidden_state
            torch.testing.assert_close(found["states"][row, :length], own[0])


def test_equal_frames_say_what_one_image_says(tmp_path):
    """Attention over tokens that repeat is attention over them once."""
    data = question_data(tmp_path)
    task = make_task(tmp_path, data=data)
    images = VqaTask(VqaOptions(**PLAIN), data, task.loaded, 0, progress=False)
    with torch.no_grad():
        losses = [t.loss(t.loaded.model, batch_of(t, range(9)))[0].item() for t in (task, images)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    answers = [t.evaluate(t.loaded.model, progress=False).details for t in (task, images)]
    assert answers[0]["predictions"] == answers[1]["predictions"]


def test_it_learns_from_videos_and_the_gallery_shows_film_strips(tmp_path):
    task = make_task(tmp_path)
    before = task.evaluate(task.loaded.model, progress=False)
    model = wrapped(task)
    options = TrainingOptions(
        epochs=40, batch_size=24, lr=1e-2, weight_decay=0.0, save_every=0, device="cpu"
    )
    train(model, task, options, tmp_path / "run", progress=False)
    after = task.evaluate(model, progress=False)
    names = ["exact match", "exact match (what)", "exact match (yes/no)"]
    assert list(after.metrics) == names
    assert after.primary == "exact match"
    assert [m.n for m in after.metrics.values()] == [24, 12, 12]
    assert after.metrics["exact match"].value >= 75
    assert task.compare(before, after)["exact match"].low > 0
    shown = task.gallery(before, after, limit=4)
    assert len(shown) == 4
    for item in shown:
        assert item.title.startswith("exact match 0 → 100")
        assert item.query.image.height == 120
        assert item.query.image.width > 4 * 120


def test_answers_are_ranked_or_written_over_the_same_frames(tmp_path):
    data = colour_questions(tmp_path)
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(["red", "green", "blue", "grey", "yes", "no"]))
    ranked = make_task(tmp_path, data=data, inference="rank", answer_list=str(path))
    found = ranked.evaluate(ranked.loaded.model, progress=False)
    given = [p["answer"] for p in found.details["predictions"]]
    assert set(given) <= {"red", "green", "blue", "grey", "yes", "no"}
    single = make_task(
        tmp_path, data=data, inference="rank", answer_list=str(path), eval_batch_size=1
    )
    again = single.evaluate(single.loaded.model, progress=False)
    assert again.details["predictions"] == found.details["predictions"]
    assert again.metrics == found.metrics
    score = 100 * sum(
        q.answers == (answer,)
        for q, answer in zip(ranked.splits["test"].records, given, strict=True)
    )
    assert found.metrics["exact match"].value == pytest.approx(score / 24)


def test_questions_without_answers_and_videos_that_do_not_decode(tmp_path, caplog):
    data = colour_questions(tmp_path, on_error="skip")
    path = tmp_path / "questions.jsonl"
    lines = path.read_text().splitlines()
    first = json.loads(lines[0])
    del first["answer"]
    path.write_text("\n".join([json.dumps(first), *lines[1:]]))
    (tmp_path / "blue-grey.mp4").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        task = make_task(tmp_path, data=data)
    counted = {"undecodable video": 2, "question without answers": 1}
    assert task.splits["train"].skipped == counted
    assert task.splits["test"].skipped == {"undecodable video": 2}
    assert f"{path}, line 1: question without answers" in caplog.text
    assert len(task.train_dataset) == 21
    strict = colour_questions(tmp_path)
    path.write_text("\n".join([json.dumps(first), *lines[1:]]))
    with pytest.raises(DataError, match=r"2 question without answers"):
        make_task(tmp_path, data=strict)
    with pytest.raises(DataError, match="it gives videos, the task needs images"):
        VqaTask(VqaOptions(), strict, loaded(), 0, progress=False)
