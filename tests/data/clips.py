"""Small videos whose frames are known: each has a grey level, or moving shapes, of its own."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
from PIL import Image, ImageDraw

TICK = Fraction(1, 1000)  # seconds
SIZE = (64, 48)


def grey(level, size=SIZE):
    return Image.new("RGB", size, (level,) * 3)


def levels(count):
    """Grey levels far enough apart to tell frames by after compression."""
    return [round(20 + 215 * i / max(1, count - 1)) for i in range(count)]


def level_of(image):
    return float(np.asarray(image).mean())


def number_of(image, count):
    """Which of `levels(count)` a frame shows; a frame between two is an error."""
    distance = np.abs(np.array(levels(count)) - level_of(image))
    assert distance.min() < 215 / count / 3, f"grey {level_of(image)} is none of {levels(count)}"
    return int(distance.argmin())


def write_video(path, images, times=None, codec="libx264", rate=10, gop=5, b_frames=2, **options):
    """Encode `images`; `times` in seconds, or at a constant `rate`."""
    import av

    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = images[0].size if images else SIZE
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        context = stream.codec_context
        context.gop_size, context.max_b_frames, context.time_base = gop, b_frames, TICK
        context.thread_count = 1
        if codec == "libx264":
            context.options = {"x264-params": "rc-lookahead=0:mbtree=0"}  # else bytes may differ
        stream.time_base = TICK
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_image(image)
            seconds = times[number] if times else Fraction(number, rate)
            frame.pts, frame.time_base = round(seconds / TICK), TICK
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def turn(path, a, b, c, d):
    """Set the display matrix in an MP4's track header (ISO 14496-12).

    A point (p, q) of the stored picture is shown at (a p + c q, b p + d q), moved into view.
    """
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4
    at += 4 + (32 if data[at] else 20) + 16
    struct.pack_into(">9i", data, at, *(v << 16 for v in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
    path.write_bytes(data)


def write_greys(path, count, **settings):
    return write_video(path, [grey(level) for level in levels(count)], **settings)


def write_sound(path):
    """A file with sound only."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        sound = np.zeros((1, 4096), np.float32)
        frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def moving_disc(colour, count=6, size=SIZE):
    """A disc that crosses a white ground from left to right."""
    images = []
    for i in range(count):
        image = Image.new("RGB", size, "white")
        x = 4 + i * (size[0] - 30) // count
        ImageDraw.Draw(image).ellipse([x, 10, x + 26, 36], fill=colour)
        images.append(image)
    return images
