"""Video-text retrieval on real small files: closed forms, determinism, learning, processes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mmtune.backbones import backbone_of
from mmtune.config import TrainingOptions
from mmtune.conformance.backbones import BACKBONES, build
from mmtune.data import DataError, DataOptions, SourceOptions
from mmtune.data.records import VideoFile
from mmtune.data.transforms import AugmentOptions
from mmtune.data.video import load_frames
from mmtune.tasks import tasks
from mmtune.tasks.retrieval import RetrievalOptions, RetrievalTask
from mmtune.tasks.video_retrieval import VideoRetrievalOptions, VideoRetrievalTask, pooled
from mmtune.training import train
from tests.data.clips import levels, write_greys
from tests.tasks.colour_videos import colour_videos
from tests.tasks.tiny import colour_data, tiny_loaded

PLAIN = VideoRetrievalOptions(augment=None, resamples=100, frames=3, eval_frames=4)


def make_task(folder, data=None, seed=0, **changes):
    options = dataclasses.replace(PLAIN, **changes)
    data = data or colour_videos(folder)
    return VideoRetrievalTask(options, data, tiny_loaded(), seed, progress=False)


def small_adapter(task):
    torch.manual_seed(0)
    return get_peft_model(
        task.loaded.model,
        LoraConfig(target_modules=["q_proj", "v_proj", "fc1", "fc2"], r=8, init_lora_weights=False),
    )


def batch_of(task, indices):
    return task.collate([task.train_dataset[i] for i in indices])


def test_it_is_found_by_name():
    assert tasks()["video_retrieval"] is VideoRetrievalTask


def test_loss_is_that_of_pooled_frames(tmp_path):
    task = make_task(tmp_path)
    batch = batch_of(task, range(8))
    assert batch["pixel_values"].shape == (8, 3, 3, 16, 16)
    loss, _ = task.loss(task.loaded.model, dict(batch))
    view, model = task.loaded.backbone, task.loaded.model
    videos = []
    for clip in batch["pixel_values"]:
        frames = torch.cat([view.encode_image(model, frame[None]) for frame in clip])
        mean = frames.double().mean(0)
        videos.append(mean / mean.norm())
    videos = torch.stack(videos)
    texts = view.encode_text(model, batch["input_ids"], batch["attention_mask"]).double()
    logits = model.logit_scale.exp().double() * videos @ texts.T
    own = torch.arange(8)
    expected = (logits.log_softmax(1)[own, own] + logits.log_softmax(0)[own, own]).mean() / -2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_pooling_has_a_closed_form():
    features = torch.tensor([[1.0, 0], [0, 1], [0, -1], [0, -1]])
    expected = torch.tensor([[0.5**0.5, 0.5**0.5], [0, -1]])
    torch.testing.assert_close(pooled(features, 2), expected)


@pytest.mark.parametrize(
    "name",
    ["open_clip", "open_clip-fused", "open_clip-timm", "clip", "siglip", "blip-retrieval"],
)
def test_every_family_embeds_videos_in_one_forward_pass(name):
    model = build(name)
    view = backbone_of(model)
    batch = BACKBONES[name].batch(0, 3)
    task = VideoRetrievalTask.__new__(VideoRetrievalTask)
    task.loaded = type("Loaded", (), {"backbone": view})()
    clips = torch.randn(3, 2, *batch["pixel_values"].shape[1:])
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    pairs = task._embed_pairs(model, {**batch, "pixel_values": clips})
    handle.remove()
    assert len(calls) == 1
    torch.testing.assert_close(pairs.image, task._image_features(model, clips))
    text = view.encode_text(model, batch["input_ids"], batch.get("attention_mask"))
    torch.testing.assert_close(pairs.text, text)
    alone = torch.stack([view.encode_image(model, clips[:, f]) for f in range(2)]).mean(0)
    torch.testing.assert_close(pairs.image, alone / alone.norm(dim=1, keepdim=True))


def test_one_frame_of_a_still_is_image_retrieval(tmp_path):
    """An image is a video that stands still: pooling equal frames changes nothing."""
    data = colour_data(tmp_path)
    task = make_task(tmp_path, data)
    images = RetrievalTask(
        RetrievalOptions(augment=None, resamples=100), data, task.loaded, 0, progress=False
    )
    one, other = (t.evaluate(t.loaded.model, progress=False).metrics for t in (task, images))
    assert list(one.values()) == list(other.values())
    assert [name.replace("vid", "img") for name in one] == list(other)
    losses = [t.loss(t.loaded.model, batch_of(t, range(8)))[0].item() for t in (task, images)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_training_frames_follow_from_seed_epoch_and_index(tmp_path):
    write_greys(tmp_path / "a.mp4", 40)
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"clip_name": "a", "caption": "x"}\n' * 2)
    data = DataOptions(train=SourceOptions("msrvtt", str(lines)))

    def seen(task, epoch, index=0):
        task.set_epoch(epoch)
        means = task.train_dataset[index].pixels.mean(
            (1, 2, 3)
        )  # normalised: (x / 255 - 0.5) / 0.5
        greys = torch.tensor(levels(40), dtype=torch.float32)
        return (greys[None] / 127.5 - 1 - means[:, None]).abs().argmin(1).tolist()

    task = make_task(tmp_path, data, frames=4, captions="all")
    drawn = [seen(task, 0), seen(task, 1), seen(task, 0, 1)]
    assert len({tuple(d) for d in drawn}) == 3
    for numbers in drawn:
        assert [n // 10 for n in numbers] == [0, 1, 2, 3]
    assert seen(make_task(tmp_path, data, frames=4, captions="all"), 1) == drawn[1]
    assert seen(make_task(tmp_path, data, frames=4, captions="all", seed=1), 1) != drawn[1]
    uniform = make_task(tmp_path, data, frames=4, sampling="uniform")
    assert seen(uniform, 0) == seen(uniform, 5) == [5, 15, 25, 35]


def test_all_frames_of_a_video_are_augmented_alike(tmp_path):
    write_greys(tmp_path / "still.mp4", 1)
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"clip_name": "still", "caption": "x"}\n')
    data = DataOptions(train=SourceOptions("msrvtt", str(lines)))
    task = make_task(tmp_path, data, frames=5, augment=AugmentOptions(brightness=0.5))
    first, again = task.train_dataset[0].pixels, None
    assert all(torch.equal(frame, first[0]) for frame in first)
    task.set_epoch(1)
    again = task.train_dataset[0].pixels
    assert not torch.equal(again, first)


def test_batches_are_the_same_with_workers(tmp_path):
    task = make_task(tmp_path, augment=AugmentOptions(scale=(0.3, 1), brightness=0.3))
    task.set_epoch(2)
    found = []
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(
            task.train_dataset, 4, num_workers=workers, collate_fn=task.collate
        )
        found.append(torch.cat([b["pixel_values"] for b in loader]))
    assert torch.equal(*found)


def test_training_raises_recall_and_the_gallery_shows_film_strips(tmp_path):
    task = make_task(tmp_path)
    before = task.evaluate(task.loaded.model, progress=False)
    model = small_adapter(task)
    options = TrainingOptions(
        epochs=50, batch_size=8, lr=1e-2, weight_decay=0.0, save_every=0, device="cpu"
    )
    train(model, task, options, tmp_path / "run", progress=False)
    after = task.evaluate(model, progress=False)
    gain = task.compare(before, after)
    assert after.metrics["txt2vid R@1"].value > 80
    assert gain["txt2vid R@1"].low > 0
    assert after.metrics["txt2vid MdR"].value == 1 < before.metrics["txt2vid MdR"].value
    shown = task.gallery(before, after, limit=6)
    pictures = [c.image for i in shown for c in (i.query, *i.before, *i.after) if c.image]
    assert {i.query.image is None for i in shown} == {True, False}
    assert {i.title.partition(":")[0] for i in shown} == {"text to video", "video to text"}
    assert all(p.height == 120 and p.width > 4 * 120 for p in pictures)


def test_evaluation_frames_are_uniform_and_the_order_of_batches_does_not_matter(tmp_path):
    task = make_task(tmp_path)
    whole = task.evaluate(task.loaded.model, progress=False).metrics
    task.set_epoch(3)
    assert task.evaluate(task.loaded.model, progress=False).metrics == whole
    small = make_task(tmp_path, eval_batch_size=3)
    assert small.evaluate(small.loaded.model, progress=False).metrics == whole
    ref = task.splits["test"].records[0].image
    expected = torch.stack([task.eval_transform(f) for f in load_frames(ref, 4)])
    assert torch.equal(task.frames.evaluation(ref), expected)


def test_bad_videos_are_counted_and_left_out(tmp_path):
    data = colour_videos(tmp_path, on_error="skip")
    good = (tmp_path / "light-red.mp4").read_bytes()
    (tmp_path / "dark-red.mp4").write_bytes(good[: len(good) // 2])
    (tmp_path / "dark-blue.mp4").unlink()
    task = make_task(tmp_path, data)
    assert task.splits["test"].skipped == {"truncated video": 1, "missing video": 1}
    assert len(task.train_dataset) == 6
    strict = dataclasses.replace(data, on_error="raise")
    with pytest.raises(DataError, match=r"2 truncated video, 2 missing video"):
        make_task(tmp_path, strict)
    with pytest.raises(DataError, match="it gives videos, the task needs images"):
        RetrievalTask(RetrievalOptions(), data, tiny_loaded(), 0, progress=False)


def test_a_run_that_stops_and_resumes_ends_like_one_that_did_not(tmp_path):
    data = colour_videos(tmp_path)
    options = TrainingOptions(epochs=4, batch_size=4, lr=1e-2, save_every=3, device="cpu")
    augment = AugmentOptions(scale=(0.5, 1), brightness=0.2)

    class Stopped(Exception):
        pass

    class Stopping(VideoRetrievalTask):
        steps = 0

        def loss(self, model, batch):
            self.steps += 1
            if self.steps == 5:
                raise Stopped
            return super().loss(model, batch)

    def fresh(kind=VideoRetrievalTask):
        settings = dataclasses.replace(PLAIN, augment=augment)
        task = kind(settings, data, tiny_loaded(), 0, progress=False)
        return task, small_adapter(task)

    task, whole = fresh()
    train(whole, task, options, tmp_path / "whole", progress=False)
    task, cut = fresh(Stopping)
    with pytest.raises(Stopped):
        train(cut, task, options, tmp_path / "cut", progress=False)
    task, resumed = fresh()
    train(resumed, task, options, tmp_path / "cut", resume=True, progress=False)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_half_precision_weights_are_fed_their_own_dtype(tmp_path):
    task = make_task(tmp_path)
    task.loaded.model.to(torch.bfloat16)
    assert task.evaluate(task.loaded.model, progress=False).metrics["RSum"].value > 0
    loss, _ = task.loss(task.loaded.model, batch_of(task, range(8)))
    assert loss.dtype == torch.float32
    ref = VideoFile(str(tmp_path), "light-red.mp4")
    features = task._image_features(task.loaded.model, task.eval_pixels(ref)[None].bfloat16())
    torch.testing.assert_close(features.norm(dim=1), torch.ones(1))
