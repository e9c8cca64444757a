"""BLIP's two losses on videos: pooled contrast, and texts read with the tokens of all frames."""

from __future__ import annotations

import pytest
import torch

from mmtune.tasks import tasks
from mmtune.tasks.video_retrieval import (
    BlipVideoRetrievalOptions,
    BlipVideoRetrievalTask,
    VideoRetrievalOptions,
    VideoRetrievalTask,
    pooled,
)
from tests.tasks.colour_videos import colour_videos
from tests.tasks.tiny import tiny_loaded
from tests.tasks.tiny_blip import ENCODE, adapted, batch_of, tiny_blip

FRAMES = {"augment": None, "resamples": 100, "frames": 2, "eval_frames": 3}


def make_task(folder, data=None, **changes):
    chosen = {"queue": 11, "match_token": ENCODE, "rerank": 3} | FRAMES | changes
    options = BlipVideoRetrievalOptions(**chosen)
    data = data or colour_videos(folder)
    return BlipVideoRetrievalTask(options, data, tiny_blip(), 0, progress=False)


def test_it_is_found_by_name_and_needs_blip(tmp_path):
    assert tasks()["blip_video_retrieval"] is BlipVideoRetrievalTask
    with pytest.raises(TypeError, match=r"needs BLIP's match head"):
        BlipVideoRetrievalTask(
            BlipVideoRetrievalOptions(), colour_videos(tmp_path), tiny_loaded(), 0, progress=False
        )


def test_states_stand_side_by_side_and_features_are_pooled():
    loaded = tiny_blip()
    parts = loaded.backbone.matching(loaded.model)
    clips = torch.randn(3, 4, 3, loaded.image.size, loaded.image.size)
    states = parts.image_states(clips)
    alone = [[parts.image_states(frame[None])[0] for frame in clip] for clip in clips]
    expected = torch.stack([torch.cat(frames) for frames in alone])
    torch.testing.assert_close(states, expected)
    features = torch.cat([loaded.backbone.encode_image(loaded.model, clip) for clip in clips])
    torch.testing.assert_close(parts.image_features(states), pooled(features, 4))


def test_the_first_stage_is_that_of_video_retrieval_and_the_second_reads_all_frames(tmp_path):
    data = colour_videos(tmp_path)
    task = make_task(tmp_path, data)
    found = task.evaluate(task.loaded.model, progress=False)
    plain = VideoRetrievalTask(
        VideoRetrievalOptions(**FRAMES), data, tiny_blip(), 0, progress=False
    )
    first = plain.evaluate(plain.loaded.model, progress=False).metrics
    assert {n: m for n, m in found.metrics.items() if "re-ranked" not in n} == first
    assert found.primary == "mean (re-ranked)"

    # Each text's best three videos by features, in the order of cosine + match logit.
    gallery, parts = (
        task.gallery_of("test"),
        task.loaded.backbone.matching(task.loaded.model, ENCODE),
    )
    tokens = task.loaded.tokenize(gallery.captions)
    with torch.no_grad():
        clips = torch.stack([task.frames.evaluation(r.image) for r in gallery.records])
        states = parts.image_states(clips)
        texts = parts.text_features(parts.text_states(**tokens))
        cosines = texts @ parts.image_features(states).T
        top = found.details["ranks"][" (re-ranked)"].txt2img.top
        for number, own in enumerate(cosines):
            best = own.topk(3).indices
            ids, mask = (tokens[k][number : number + 1] for k in ("input_ids", "attention_mask"))
            match = torch.cat(
                [parts.logits(parts.fused(ids, mask, states[b : b + 1])) for b in best]
            )
            order = best[(own[best] + match[:, 1]).argsort(descending=True)]
            assert top[number][:3].tolist() == order.tolist()


def test_training_lowers_both_losses(tmp_path):
    task = make_task(tmp_path, rerank=0)
    model = adapted(task, rank=8)
    hooks = task.hooks(model, 50)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    batch = batch_of(task, [0, 5, 9, 14])
    assert batch["pixel_values"].shape[:3] == (4, 2, 3)
    seen = []
    for step in range(1, 41):
        hooks.before_step(step)
        loss, numbers = task.loss(model, batch)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        hooks.after_step(step)
        seen.append([float(numbers[name]) for name in ("itc", "itm")])
    seen = torch.tensor(seen)
    first, last = seen[3:8].mean(0), seen[-5:].mean(0)
    assert last[0] < first[0] - 0.2
    assert last[1] < 0.2
