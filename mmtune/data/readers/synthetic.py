"""Made-up images, videos, captions and questions, to rehearse a run at its real size.

`name` says what: captions, questions, video_captions or video_questions; `limit` how many. Videos
are written below `path`. Everything follows from the role and the number of the record.
"""

from __future__ import annotations

import io
import os
import random
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.backbones.architectures import WORDS
from mmtune.data.options import SourceOptions
from mmtune.data.records import (
    DataError,
    ImageBytes,
    MediaRef,
    Problem,
    Question,
    Record,
    VideoFile,
)

if TYPE_CHECKING:
    from PIL.Image import Image

KINDS = ("captions", "questions", "video_captions", "video_questions")
DEFAULT = 64  # records where `limit` says nothing
PICTURE = (640, 480)  # pixels, as most photos of COCO have
FILM, FRAMES, RATE = (320, 240), 32, 16  # pixels, frames, and frames a second
FILMS = 16  # different videos; records take turns at them
CAPTIONS, CAPTION_WORDS, QUESTION_WORDS = 5, (8, 14), (5, 9)
ANNOTATORS = 10
ANSWERS = WORDS[:100]


def read(source: SourceOptions, role: str) -> Iterator[Record | Question | Problem]:
    """Yield `limit` records.

    Raises:
        DataError: no such kind, or videos without a folder to write them to.
    """
    if source.name not in KINDS:
        text = f"name must be one of {', '.join(KINDS)}, got {source.name!r}"
        raise DataError([Problem(f"data.{role}", "no such synthetic data", text)])
    films = source.name.startswith("video")
    if films and not source.path:
        text = "videos need `path`, a folder to write them to"
        raise DataError([Problem(f"data.{role}", "no folder", text)])
    for number in range(source.limit or DEFAULT):
        rng = random.Random(f"synthetic {role} {number}")
        media: MediaRef = _film(str(source.path), number % FILMS) if films else _picture(rng)
        where = f"synthetic {role}, record {number}"
        if source.name.endswith("captions"):
            yield Record(media, _captions(rng), str(number), where)
        else:
            yield _question(media, rng, number, where)


def _captions(rng: random.Random) -> tuple[str, ...]:
    return tuple(_sentence(rng, CAPTION_WORDS) for _ in range(CAPTIONS))


def _question(media: MediaRef, rng: random.Random, number: int, where: str) -> Question:
    """Most annotators agree; the others give one of two other answers."""
    likely, *others = rng.sample(ANSWERS, 3)
    answers = [likely] * 7 + [rng.choice(others) for _ in range(ANNOTATORS - 7)]
    return Question(media, _sentence(rng, QUESTION_WORDS) + "?", tuple(answers), str(number), where)


def _sentence(rng: random.Random, words: tuple[int, int]) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(*words)))


def _picture(rng: random.Random) -> ImageBytes:
    file = io.BytesIO()
    _blots(rng, PICTURE).save(file, "JPEG", quality=90)
    return ImageBytes(file.getvalue())


def _blots(rng: random.Random, size: tuple[int, int]) -> Image:
    """Smooth colours: they compress about as well as photos, unlike noise."""
    from PIL import Image

    small = Image.frombytes("RGB", (16, 12), rng.randbytes(3 * 16 * 12))
    return small.resize(size, Image.Resampling.BICUBIC)


def _film(folder: str, number: int) -> VideoFile:
    """An mp4 file; a folder of its frames where PyAV is not installed."""
    with_av = find_spec("av") is not None
    name = f"film-{number:02}" + (".mp4" if with_av else "")
    path = Path(folder) / name
    if not path.exists():
        rng = random.Random(f"film {number}")
        first, last = (_blots(rng, FILM) for _ in range(2))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{os.getpid()}-{name}")
        (_encode if with_av else _unpack)(partial, first, last)
        try:
            partial.rename(path)
        except OSError:  # another process of the run wrote the same folder first
            shutil.rmtree(partial)
    return VideoFile(folder, name)


def _frames(first: Image, last: Image) -> Iterator[Image]:
    """One picture fading into another."""
    from PIL import Image

    for number in range(FRAMES):
        yield Image.blend(first, last, number / (FRAMES - 1))


def _encode(path: Path, first: Image, last: Image) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height = FILM
        stream.pix_fmt = "yuv420p"
        for frame in _frames(first, last):
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def _unpack(path: Path, first: Image, last: Image) -> None:
    path.mkdir()
    for number, frame in enumerate(_frames(first, last)):
        frame.save(path / f"{number:03}.jpg")
