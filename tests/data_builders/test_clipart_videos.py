"""The made videos: what a clip shows, captions of the drawings, the same bytes again."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from data_builders.clipart_videos import FRAMES, MOTIONS, SPLITS, build, frames, main
from mmtune.data import SourceOptions
from mmtune.data.readers import read
from mmtune.data.records import VideoFile
from mmtune.data.video import check_video, load_frames

GROUND = (200, 240, 220)


def drawn(picture):
    """Where a picture is black: height, width and middle of the box around it, in pixels."""
    rows, columns = np.nonzero(np.asarray(picture).sum(2) < 150)
    spans = [
        (axis.max() - axis.min() + 1, (axis.max() + axis.min()) / 2) for axis in (rows, columns)
    ]
    (height, y), (width, x) = spans
    return height, width, y, x


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_drawing_does_what_its_motion_says(motion):
    drawing = Image.new("RGB", (40, 80), "white")
    drawing.paste("black", (10, 10, 30, 70))
    clip = list(frames(drawing, motion, GROUND))
    assert len(clip) == FRAMES
    first, last = drawn(clip[0]), drawn(clip[-1])
    assert clip[0].getpixel((0, 0)) == GROUND
    moved = {"slides right": (3, 1), "slides left": (3, -1), "sinks": (2, 1), "rises": (2, -1)}
    if motion in moved:
        axis, sign = moved[motion]
        assert sign * (last[axis] - first[axis]) > 20
        assert last[5 - axis] == first[5 - axis]
    elif motion == "grows":
        assert last[0] > 2 * first[0]
    elif motion == "shrinks":
        assert first[0] > 2 * last[0]
    else:
        assert max(drawn(f)[1] for f in clip) > 1.2 * min(drawn(f)[1] for f in clip)


def test_clips_are_the_drawings_of_the_split_and_come_out_alike(tmp_path):
    out = tmp_path / "made"
    assert build(out, limit=3) == dict.fromkeys(SPLITS, 3)
    for split in SPLITS:
        path = str(out / f"{split}.jsonl")
        source = SourceOptions("msrvtt", path, images=str(out / "videos"))
        clips = list(read(source))
        zoo = SourceOptions("zoo", name="clipart-{animals,food}", split=split, limit=3)
        drawings = list(read(zoo))
        assert [c.captions for c in clips] == [d.captions for d in drawings]
        assert [c.fields["drawing"] for c in clips] == [d.id for d in drawings]
        for clip in clips:
            check_video(clip.image)
            pictures = load_frames(clip.image, FRAMES)
            assert {p.size for p in pictures} == {(96, 96)}
            assert not np.array_equal(*(np.asarray(p) for p in (pictures[0], pictures[-1])))
    text = (out / "README.txt").read_text()
    assert text.startswith("Made data")

    def hashes(folder):
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        return [(p.relative_to(folder), hashlib.sha256(p.read_bytes()).digest()) for p in files]

    main(["--out", str(tmp_path / "again"), "--limit", "3"])
    assert hashes(tmp_path / "again") == hashes(out)
    main(["--out", str(tmp_path / "other"), "--limit", "1", "--seed", "1"])
    lines = [
        json.loads((f / "test.jsonl").read_text().splitlines()[0])
        for f in (out, tmp_path / "other")
    ]
    assert lines[0]["caption"] == lines[1]["caption"]
    one, other = (
        np.asarray(load_frames(VideoFile(str(f / "videos"), "test-000.mp4"), 1)[0], float)
        for f in (out, tmp_path / "other")
    )
    assert np.abs(one[0, 0] - other[0, 0]).max() > 3  # another ground
