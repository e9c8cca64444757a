"""Encoded video to RGB frames, chosen by time: the same ones always, or random ones to train on.

A video of `count` frames is cut into `count` segments of equal duration, and one frame is taken
from each: the one on screen at the segment's middle (evaluation), or at a random time in it
(training). Of n frames at a constant rate that is frame floor((j + 1/2) n / count) for segment j. A
video with fewer frames than asked for repeats some.
"""

from __future__ import annotations

import os
import random
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from statistics import median_low
from typing import TYPE_CHECKING, Any

from mmtune.data.images import load_image
from mmtune.data.records import ImageFile, ImageProblem, MediaRef, VideoFile

if TYPE_CHECKING:
    from PIL.Image import Image

CHECKED = 2  # frames that checking decodes, spread as evaluation spreads its frames
WHOLE = 0.9  # share of the stated duration that the data must cover
# Formats whose header states a duration; others are measured or guessed from what is there.
STATES_DURATION = ("mp4", "matroska", "avi")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
THUMBNAIL = 160  # pixels, longest side
STRIP = 4  # frames of a film strip
STRIP_HEIGHT = 120  # pixels


def load_frames(ref: VideoFile, count: int, rng: random.Random | None = None) -> list[Image]:
    """Decode `count` frames of a video in the order of time, as RGB.

    Rotation that the file asks for is applied. Times are those of the file, so a variable frame
    rate is respected; where they are missing or repeat (B-frames in AVI), frames are counted
    instead. A folder of pictures is a video too: its frames are in the order of their names, at a
    constant rate. Pixels that are not square are not stretched.

    Args:
        ref: a video file, or a folder of frames.
        count: how many frames.
        rng: draws a time in each of `count` segments; None takes their middles.

    Raises:
        ImageProblem: missing, outside its root, undecodable, or without frames.
        ImportError: PyAV is not installed.
    """
    path = ref.path()
    moments = positions(count, rng)
    if os.path.isdir(path):
        return _pictures(path, moments)
    with _opened(path, ref.name) as (container, stream):
        return _frames(container, stream, _index(container, stream, ref.name), moments, ref.name)


def positions(count: int, rng: random.Random | None = None) -> list[Fraction]:
    """The time of each frame as a share of the video, in [0, 1); exact, so that ties are none."""
    return [
        (j + (Fraction(1, 2) if rng is None else Fraction(rng.random()))) / count
        for j in range(count)
    ]


def check_video(ref: VideoFile) -> None:
    """Read the whole file and decode two frames of it.

    Raises:
        ImageProblem: "missing video", "video outside root", "undecodable video", "video without
            frames", "truncated video".
        ImportError: PyAV is not installed.
    """
    path = ref.path()
    if os.path.isdir(path):
        _pictures(path, positions(CHECKED))
        return
    with _opened(path, ref.name) as (container, stream):
        index = _index(container, stream, ref.name)
        _require_whole(container, index, ref.name)
        _frames(container, stream, index, positions(CHECKED), ref.name)


def picture(ref: MediaRef) -> Image:
    """What a report shows: a film strip of a video, or a small copy of an image."""
    if isinstance(ref, VideoFile):
        return film_strip(ref)
    image = load_image(ref)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def film_strip(ref: VideoFile) -> Image:
    """Four frames side by side, in the order of time."""
    from PIL import Image

    frames = load_frames(ref, STRIP)
    width = max(1, round(frames[0].width * STRIP_HEIGHT / frames[0].height))
    gap = 3
    strip = Image.new("RGB", (STRIP * (width + gap) - gap, STRIP_HEIGHT), "white")
    for number, frame in enumerate(frames):
        strip.paste(frame.resize((width, STRIP_HEIGHT)), (number * (width + gap), 0))
    return strip


@dataclass(frozen=True)
class _Index:
    """What a pass over the packets of a file found; times in units of the stream.

    Attributes:
        starts: when each frame comes on screen, ascending; empty where that is not known.
        keys: the times of key frames, ascending.
        end: when the last frame leaves the screen.
        damaged: whether a packet is cut short, or reading failed.
        seconds: where the data of all streams end.
    """

    starts: list[int]
    keys: list[int]
    end: int
    damaged: bool
    seconds: float

    def at(self, moment: Fraction) -> int:
        """The start of the frame that is on screen at a share of the video."""
        time = self.starts[0] + moment * (self.end - self.starts[0])
        return self.starts[bisect_right(self.starts, time) - 1]

    def key_before(self, start: int) -> int:
        """The key frame from which the frame that starts at `start` can be decoded."""
        return self.keys[max(0, bisect_right(self.keys, start) - 1)]


@contextmanager
def _opened(path: str, name: str) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream; what FFmpeg objects to is an ImageProblem."""
    av = _av()
    try:
        # A title in another encoding than UTF-8 is no reason to refuse a video.
        with av.open(path, metadata_errors="replace") as container:
            stream = container.streams.best("video")  # not the cover picture of a song
            if stream is None:
                raise _no_stream(container, name)
            if stream.codec_context is None:
                raise ImageProblem("undecodable video", f"{name!r}: no decoder for its stream")
            # Videos are decoded side by side by threads and workers, each with one thread.
            stream.codec_context.thread_count = 1
            yield container, stream
    except av.FFmpegError as error:
        raise _objection(path, name, error) from None


def _no_stream(container: Any, name: str) -> ImageProblem:
    kinds = sorted({stream.type for stream in container.streams})
    if kinds:
        text = f"{name!r} has no video stream, only {', '.join(kinds)}"
        return ImageProblem("video without frames", text)
    return ImageProblem("truncated video", f"{name!r} ends before the list of its streams")


def _objection(path: str, name: str, error: Any) -> ImageProblem:
    """What FFmpeg cannot read: MP4 keeps what it needs first at its end, where a cut takes it."""
    with open(path, "rb") as file:
        head = file.read(8)
    if not head:
        return ImageProblem("undecodable video", f"{name!r}: the file is empty")
    cut = head[4:] == b"ftyp" or isinstance(error, EOFError)
    text = f"{name!r}: {getattr(error, 'strerror', error)}"
    return ImageProblem("truncated video" if cut else "undecodable video", text)


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"videos are decoded by PyAV, which cannot be imported ({error}). Install it by: "
            'pip install "mmtune[video]"'
        ) from None
    return av


def _index(container: Any, stream: Any, name: str) -> _Index:
    """Read every packet without decoding. Raises ImageProblem where none holds a frame."""
    from av import FFmpegError

    shown: list[tuple[int | None, int, bool]] = []
    damaged, seconds = False, 0.0
    try:
        for packet in container.demux():
            if packet.size == 0:  # the mark of the end
                continue
            damaged |= packet.is_corrupt
            begin = packet.dts if packet.pts is None else packet.pts
            if begin is not None:
                seconds = max(seconds, float((begin + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index == stream.index and not packet.is_discard:
                shown.append((packet.pts, packet.duration, packet.is_keyframe))
    except FFmpegError:
        damaged = True
    if not shown:
        raise ImageProblem("video without frames", f"{name!r} has a video stream without a frame")
    starts = sorted({pts for pts, _, _ in shown if pts is not None})
    keys = sorted({pts for pts, _, key in shown if key and pts is not None})
    if len(starts) < len(shown) or not keys:
        return _Index([], [], 0, damaged, seconds)
    gaps = [b - a for a, b in pairwise(starts)]
    stated = {pts: duration for pts, duration, _ in shown}[starts[-1]]
    last = stated or (median_low(gaps) if gaps else 1)
    return _Index(starts, keys, starts[-1] + last, damaged, seconds)


def _require_whole(container: Any, index: _Index, name: str) -> None:
    """ImageProblem where the data end before the file says they do."""
    stated = (container.duration or 0) / 1e6
    if not any(kind in container.format.name for kind in STATES_DURATION):
        stated = 0.0
    if index.damaged:
        text = f"{name!r}: its data break off after {index.seconds:.1f} s"
        raise ImageProblem("truncated video", text)
    if index.seconds < WHOLE * stated:
        text = f"{name!r}: its data end after {index.seconds:.1f} s of the {stated:.1f} s it states"
        raise ImageProblem("truncated video", text)


def _frames(
    container: Any, stream: Any, index: _Index, moments: Sequence[Fraction], name: str
) -> list[Image]:
    """The frames at shares of the video, as pictures."""
    if index.starts:
        wanted = [index.at(moment) for moment in moments]
        player = _Player(container, stream, index)
        found = {start: player.frame(start) for start in sorted(set(wanted))}
    else:
        container.seek(0)
        count = sum(1 for _ in container.decode(stream))
        wanted = [int(moment * count) for moment in moments]
        container.seek(0)
        every = enumerate(container.decode(stream))
        found = {number: _picture(frame) for number, frame in every if number in wanted}
    pictures = [picture for key in wanted if (picture := found.get(key)) is not None]
    if len(pictures) < len(wanted):
        raise ImageProblem("undecodable video", f"{name!r}: no frame of it can be decoded")
    return pictures


class _Player:
    """Decodes frames in ascending order of time, from the nearest key frame before each."""

    def __init__(self, container: Any, stream: Any, index: _Index) -> None:
        self.container, self.stream, self.index = container, stream, index
        self.frames: Iterator[Any] = iter(())
        self.on_screen = self.ahead = None

    def frame(self, start: int) -> Image | None:
        """The frame on screen at `start`, or the first one where all of them come later."""
        key = self.index.key_before(start)
        if self.on_screen is None or key > self.on_screen.pts:
            self._jump(start)
            if self.ahead is None or self.ahead.pts > key:  # too far to decode what is asked for
                self._jump(None)
        self._play(start)
        return None if self.on_screen is None else _picture(self.on_screen)

    def _jump(self, time: int | None) -> None:
        """To the key frame before a time, or one before that; None: to the file's beginning."""
        if time is None:
            self.container.seek(0)
        else:
            self.container.seek(time, stream=self.stream)
        self.frames = self.container.decode(self.stream)
        self.on_screen, self.ahead = None, next(self.frames, None)

    def _play(self, start: int) -> None:
        """Go on until `start`. Not every packet has a frame to show: then the last one stays."""
        while self.on_screen is None or self.on_screen.pts < start:
            self.ahead = self.ahead or next(self.frames, None)
            if self.ahead is None or (self.on_screen is not None and self.ahead.pts > start):
                return
            self.on_screen, self.ahead = self.ahead, None


def _picture(frame: Any) -> Image:
    """An RGB image, turned as the file asks for."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _pictures(folder: str, moments: Sequence[Fraction]) -> list[Image]:
    """Frames that lie in a folder as pictures, in the order of their names."""
    names = sorted((n for n in os.listdir(folder) if n.lower().endswith(PICTURES)), key=_counted)
    if not names:
        text = f"the folder {folder} holds no picture ({', '.join(PICTURES)})"
        raise ImageProblem("video without frames", text)
    wanted = [names[int(moment * len(names))] for moment in moments]
    try:
        found = {name: load_image(ImageFile(folder, name)) for name in dict.fromkeys(wanted)}
    except ImageProblem as error:
        raise ImageProblem("undecodable video", f"a frame in {folder}: {error}") from None
    return [found[name] for name in wanted]


def _counted(name: str) -> list[str | int]:
    """A key by which frame-2 comes before frame-10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
