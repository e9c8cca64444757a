"""Frames of real small files: which, in what order, turned how; and files that are no videos."""

from __future__ import annotations

import random
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image, ImageColor

from mmtune.data import DataError, ImageProblem, Record
from mmtune.data.checking import check
from mmtune.data.images import load_image
from mmtune.data.records import VideoFile
from mmtune.data.video import check_video, film_strip, load_frames, positions
from tests.data.clips import (
    grey,
    level_of,
    levels,
    number_of,
    turn,
    write_greys,
    write_sound,
    write_video,
)
from tests.data.pictures import encoded

N = 23
KINDS = {
    "b-frames.mp4": {},
    "one-key-frame.mp4": {"gop": 100},
    "all-key-frames.mp4": {"gop": 1, "b_frames": 0},
    "index-first.mp4": {"movflags": "faststart"},
    "fragments.mp4": {"movflags": "frag_keyframe+empty_moov"},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "h264.mkv": {},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "mpeg4.avi": {"codec": "mpeg4", "b_frames": 0},
    "times-repeat.avi": {},
    "broadcast.ts": {},
}


def chosen(folder, name, count, frames=N, rng=None):
    return [number_of(f, frames) for f in load_frames(VideoFile(str(folder), name), count, rng)]


@pytest.mark.parametrize("name", KINDS)
def test_uniform_frames_are_the_middles_of_equal_segments(tmp_path, name):
    write_greys(tmp_path / name, N, **KINDS[name])
    check_video(VideoFile(str(tmp_path), name))
    for count in (1, 2, 3, 7, N, 40):
        expected = [(2 * j + 1) * N // (2 * count) for j in range(count)]
        assert chosen(tmp_path, name, count) == expected


def test_frames_found_by_seeking_are_those_of_decoding_everything(tmp_path):
    import av

    rng = np.random.default_rng(3)
    images = [
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((64, 48))
        for _ in range(50)
    ]
    write_video(tmp_path / "a.mp4", images, gop=8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        every = [np.asarray(f.to_image()) for f in container.decode(video=0)]
    assert len(every) == 50
    for count in (3, 10, 50):
        found = load_frames(VideoFile(str(tmp_path), "a.mp4"), count)
        for j, image in enumerate(found):
            np.testing.assert_array_equal(np.asarray(image), every[(2 * j + 1) * 50 // (2 * count)])


def test_variable_frame_rate_goes_by_time(tmp_path):
    # On screen for 0.1, 0.1, 0.8, 2.0 and 1.0 seconds; the last lasts as it says, of 4 in all.
    times = [0, Fraction(1, 10), Fraction(2, 10), 1, 3]
    write_greys(tmp_path / "a.mkv", 5, times=times, rate=1, b_frames=0)
    # Middles: 0.5, 1.5, 2.5, 3.5 seconds.
    assert chosen(tmp_path, "a.mkv", 4, 5) == [2, 3, 3, 4]
    # 0.05, 0.15, ... : the first two frames fill one segment each.
    assert chosen(tmp_path, "a.mkv", 40, 5) == [0, 1, *[2] * 8, *[3] * 20, *[4] * 10]


def test_random_frames_stay_in_their_segments_and_follow_from_the_generator(tmp_path):
    write_greys(tmp_path / "a.mp4", N)
    seen = [set() for _ in range(4)]
    for seed in range(60):
        drawn = chosen(tmp_path, "a.mp4", 4, rng=random.Random(seed))
        assert drawn == chosen(tmp_path, "a.mp4", 4, rng=random.Random(seed))
        assert drawn == sorted(drawn)
        for segment, number in zip(seen, drawn, strict=True):
            segment.add(number)
    for j, segment in enumerate(seen):
        assert segment == set(range(j * N // 4, -(-(j + 1) * N // 4)))


def test_positions_are_exact_shares():
    assert positions(3) == [Fraction(1, 6), Fraction(1, 2), Fraction(5, 6)]
    rng = random.Random(5)
    expected = [(j + Fraction(rng.random())) / 3 for j in range(3)]
    assert positions(3, random.Random(5)) == expected


def test_short_videos_repeat_frames(tmp_path):
    write_greys(tmp_path / "one.mp4", 1)
    assert chosen(tmp_path, "one.mp4", 4, 1) == [0] * 4
    write_greys(tmp_path / "three.mp4", 3)
    assert chosen(tmp_path, "three.mp4", 8, 3) == [0, 0, 0, 1, 1, 2, 2, 2]


def corners():
    """A picture whose four corners differ: red, green, blue, white from the top left by rows."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32], pixels[:24, 32:], pixels[24:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    pixels[24:, 32:] = 255
    return Image.fromarray(pixels)


TURNS = {
    "clockwise": (0, 1, -1, 0),
    "counterclockwise": (0, -1, 1, 0),
    "upside down": (-1, 0, 0, -1),
}


@pytest.mark.parametrize("kind", TURNS)
def test_rotation_is_applied_as_the_file_says(tmp_path, kind):
    a, b, c, d = TURNS[kind]
    turn(write_video(tmp_path / "a.mp4", [corners()] * 4), a, b, c, d)
    (shown,) = load_frames(VideoFile(str(tmp_path), "a.mp4"), 1)
    assert shown.size == ((64, 48) if a else (48, 64))
    stored, turned = (np.asarray(image).astype(int) for image in (corners(), shown))
    height, width = turned.shape[:2]
    for p, q in [(8, 8), (56, 8), (8, 40), (56, 40)]:
        x, y = a * p + c * q, b * p + d * q  # negative: counted from the other edge
        assert np.abs(turned[y % height, x % width] - stored[q, p]).max() < 40
    top_left = {"clockwise": "blue", "counterclockwise": "lime", "upside down": "white"}[kind]
    assert np.abs(turned[8, 8] - ImageColor.getrgb(top_left)).max() < 40


def test_a_folder_of_pictures_is_a_video(tmp_path):
    (tmp_path / "video0").mkdir()
    for number, level in enumerate(levels(12)):
        grey(level).save(tmp_path / "video0" / f"frame-{number}.png")
    (tmp_path / "video0" / "notes.txt").write_text("no frame")
    check_video(VideoFile(str(tmp_path), "video0"))
    assert chosen(tmp_path, "video0", 12, 12) == list(range(12))  # 2 before 10
    assert chosen(tmp_path, "video0", 3, 12) == [2, 6, 10]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageProblem, match="video without frames: the folder"):
        check_video(VideoFile(str(tmp_path), "empty"))
    (tmp_path / "video0" / "frame-3.png").write_bytes(encoded()[:30])
    with pytest.raises(ImageProblem, match=r"undecodable video: a frame in .*not an image"):
        check_video(VideoFile(str(tmp_path), "video0"))


def test_a_film_strip_has_four_frames_side_by_side(tmp_path):
    write_greys(tmp_path / "a.mp4", N)
    strip = film_strip(VideoFile(str(tmp_path), "a.mp4"))
    assert strip.size == (4 * 160 + 3 * 3, 120)
    found = [level_of(strip.crop((x, 20, x + 100, 100))) for x in (20, 183, 346, 509)]
    wanted = [levels(N)[(2 * j + 1) * N // 8] for j in range(4)]
    np.testing.assert_allclose(found, wanted, atol=3)


def broken_videos(folder):
    """name -> the reason for which it is refused."""
    whole = write_greys(folder / "good.mp4", N).read_bytes()
    first = write_greys(folder / "first.mp4", N, movflags="faststart").read_bytes()
    mkv = write_greys(folder / "good.mkv", N).read_bytes()
    noise = [Image.effect_noise((64, 48), 90).convert("RGB") for _ in range(N)]
    avi = write_video(folder / "good.avi", noise, codec="mpeg4", b_frames=0).read_bytes()
    files = {
        "no-index.mp4": (whole[: len(whole) // 2], "truncated video"),
        "half.mp4": (first[: len(first) * 3 // 4], "truncated video"),
        "half.mkv": (mkv[: len(mkv) * 3 // 4], "truncated video"),
        "half.avi": (avi[: len(avi) // 2], "truncated video"),
        "empty.mp4": (b"", "undecodable video"),
        "page.mp4": (b"<html>not found</html>" * 50, "undecodable video"),
        "picture.txt": (b"\0" * 5000, "undecodable video"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    write_sound(folder / "sound.m4a")
    (folder.parent / "outside.mp4").write_bytes(whole)
    (folder / "link.mp4").symlink_to(folder.parent / "outside.mp4")
    return {name: reason for name, (_, reason) in files.items()} | {
        "sound.m4a": "video without frames",
        "nowhere.mp4": "missing video",
        "nul\0byte.mp4": "missing video",
        "../outside.mp4": "video outside root",
        "link.mp4": "video outside root",
    }


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    return inside


def test_what_is_no_video_is_named_and_counted(folder):
    broken = broken_videos(folder)
    for name, reason in broken.items():
        with pytest.raises(ImageProblem) as caught:
            check_video(VideoFile(str(folder), name))
        assert caught.value.reason == reason, f"{name}: {caught.value}"
        assert repr(name) in str(caught.value)
    good = ("good.mp4", "good.mkv", "good.avi")
    records = [
        Record(VideoFile(str(folder), name), ("c",), name, f"f, line {i}")
        for i, name in enumerate([*broken, *good])
    ]
    found = check(records, "skip", progress=False)
    assert [r.id for r in found.records] == list(good)
    counts = {r: list(broken.values()).count(r) for r in broken.values()}
    assert found.skipped == counts
    with pytest.raises(DataError, match=r"f, line 0: truncated video: 'no-index.mp4'"):
        check(records, "raise", progress=False)


def test_a_title_that_is_not_utf_8_does_not_matter(tmp_path):
    path = write_greys(tmp_path / "a.mkv", 5)
    data = path.read_bytes()
    assert data.count(b"ENCODER") > 0
    path.write_bytes(data.replace(b"ENCODER", b"\xe9NCODER"))
    check_video(VideoFile(str(tmp_path), "a.mkv"))
    assert chosen(tmp_path, "a.mkv", 5, 5) == list(range(5))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_damage_anywhere_is_an_image_problem_or_none(tmp_path, name):
    settings = {"codec": "mpeg4", "b_frames": 0} if name.endswith("avi") else {}
    path = write_greys(tmp_path / name, 8, **settings)
    whole = path.read_bytes()
    ref = VideoFile(str(tmp_path), name)
    refused = 0
    for seed in range(40):
        rng = random.Random(seed)
        data = bytearray(whole)
        for _ in range(rng.choice([1, 3, 20])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        for act in (check_video, lambda r: load_frames(r, 3)):
            try:
                act(ref)
            except ImageProblem:
                refused += 1
    assert 0 < refused < 80


def test_a_video_is_no_image(tmp_path):
    with pytest.raises(ImageProblem, match="video, not an image"):
        load_image(VideoFile(str(tmp_path), "a.mp4"))


def test_without_pyav_the_message_says_what_to_install(tmp_path, monkeypatch):
    write_greys(tmp_path / "a.mp4", 3)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r'pip install "mmtune\[video\]"'):
        load_frames(VideoFile(str(tmp_path), "a.mp4"), 2)
