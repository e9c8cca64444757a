"""Make short videos of the zoo's animals and food, to try video retrieval without a download.

    python -m data_builders.clipart_videos --out runs/data/made-clipart-videos

Made data: a drawing moves, grows, shrinks or turns over a plain ground, and the caption is the
drawing's. Nothing in a caption is about the motion, so this is no test of understanding time. The
splits are those of the drawings. The same drawings give the same bytes (with the same PyAV).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.data.images import load_image
from mmtune.data.options import SourceOptions
from mmtune.data.readers import read
from mmtune.data.records import Record
from mmtune.runs import write_text

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

DRAWINGS = "clipart-{animals,food}"
SPLITS = ("train", "val", "test")
SIZE = 96  # pixels a side
FRAMES, RATE = 12, 8  # frames, frames a second
# Looking ahead, x264 now and then decides otherwise on the same pictures.
ENCODING = {"crf": "20", "x264-params": "rc-lookahead=0:mbtree=0"}
SHARE = 0.68  # of the side, that a drawing fills at rest
Pose = tuple[float, float, float, float]  # scale, degrees, and shifts in shares of the side
# What a drawing does as time goes from 0 to 1.
MOTIONS: dict[str, Callable[[float], Pose]] = {
    "slides right": lambda t: (1, 0, 0.36 * t - 0.18, 0),
    "slides left": lambda t: (1, 0, 0.18 - 0.36 * t, 0),
    "rises": lambda t: (1, 0, 0, 0.18 - 0.36 * t),
    "sinks": lambda t: (1, 0, 0, 0.36 * t - 0.18),
    "grows": lambda t: (0.5 + 0.8 * t, 0, 0, 0),
    "shrinks": lambda t: (1.3 - 0.8 * t, 0, 0, 0),
    "turns": lambda t: (0.95, 120 * t - 60, 0, 0),
    "sways": lambda t: (1, 20 * math.sin(2 * math.pi * t), 0.15 * math.sin(2 * math.pi * t), 0),
}
NOTE = (
    "Made data: drawings of the Open Clip Art Library (public domain) that move over a plain "
    "ground,\nby data_builders/clipart_videos.py. Captions are those of the drawings; `motion` "
    "says what moves.\n"
)


def frames(drawing: Image, motion: str, ground: tuple[int, int, int]) -> Iterator[Image]:
    """The pictures of a clip: a drawing on white, moved, multiplied onto the ground's colour."""
    from PIL import Image, ImageChops

    side = SHARE * SIZE / max(drawing.size)
    for number in range(FRAMES):
        scale, degrees, right, down = MOTIONS[motion](number / (FRAMES - 1))
        size = [max(1, round(edge * side * scale)) for edge in drawing.size]
        moved = drawing.resize((size[0], size[1]), Image.Resampling.BILINEAR)
        if degrees:
            moved = moved.rotate(degrees, Image.Resampling.BILINEAR, expand=True, fillcolor="white")
        sheet = Image.new("RGB", (SIZE, SIZE), "white")
        x, y = (SIZE / 2 + SIZE * shift for shift in (right, down))
        sheet.paste(moved, (round(x - moved.width / 2), round(y - moved.height / 2)))
        yield ImageChops.multiply(sheet, Image.new("RGB", (SIZE, SIZE), ground))


def encode(pictures: Iterator[Image], path: Path) -> None:
    """Write pictures as H.264 in MP4, under a temporary name that is then replaced."""
    import av

    partial = path.with_name(f".{path.name}")
    with av.open(str(partial), "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=RATE, options=ENCODING)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # what several threads write differs
        stream.codec_context.time_base = Fraction(1, RATE)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_image(picture)
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    os.replace(partial, path)


def build(out: Path, seed: int = 0, limit: int | None = None) -> dict[str, int]:
    """Write videos/*.mp4 and one {split}.jsonl of {"clip_name", "caption", ...} for each split.

    Args:
        out: where they go; made if missing.
        seed: of motions and grounds.
        limit: clips of each split; None makes all.

    Returns:
        Split -> how many clips.
    """
    videos = out / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split in SPLITS:
        source = SourceOptions("zoo", name=DRAWINGS, split=split, limit=limit)
        lines = []
        for number, record in enumerate(r for r in read(source) if isinstance(r, Record)):
            rng = random.Random(f"{seed} {record.id}")
            motion = rng.choice(sorted(MOTIONS))
            red, green, blue = (rng.randint(190, 255) for _ in range(3))
            name = f"{split}-{number:03}"
            encode(
                frames(load_image(record.image), motion, (red, green, blue)),
                videos / f"{name}.mp4",
            )
            line = {"clip_name": name, "caption": record.captions[0]}
            lines.append(json.dumps(line | {"motion": motion, "drawing": record.id}))
        write_text(out / f"{split}.jsonl", "\n".join(lines) + "\n")
        counts[split] = len(lines)
    write_text(out / "README.txt", NOTE)
    return counts


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(
        prog="python -m data_builders.clipart_videos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of motions and grounds (default 0)")
    parser.add_argument("--limit", type=int, help="clips of each split (default: all)")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    for split, count in build(given.out, given.seed, given.limit).items():
        log.info("%s: %d videos", split, count)


if __name__ == "__main__":
    main()
