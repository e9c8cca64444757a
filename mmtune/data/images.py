"""Encoded image to RGB pixels: orientation applied, transparency on white."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING

from mmtune.data.records import ImageProblem, MediaRef, VideoFile

if TYPE_CHECKING:
    from PIL.Image import Image


def load_image(ref: MediaRef) -> Image:
    """Decode an image to RGB.

    The EXIF orientation is applied; palettes are resolved; transparent pixels are composited on
    white; 16-bit grey is scaled to 8 bits.

    Raises:
        ImageProblem: missing, outside its root, empty, zero-size, truncated, too large, no image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(ref, VideoFile):
        raise ImageProblem("video, not an image", ref.name)
    data = ref.read()
    if not data:
        raise ImageProblem("zero-size image", "the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except UnidentifiedImageError:
        if 0 in (size := _stated_size(data)):
            raise ImageProblem("zero-size image", f"{size[0]} x {size[1]} pixels") from None
        raise ImageProblem("not an image", f"{len(data)} bytes, {data[:8]!r}...") from None
    except Image.DecompressionBombError as error:
        raise ImageProblem("image too large", str(error)) from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
        raise ImageProblem("truncated image", f"{type(error).__name__}: {error}") from None
    return _rgb(image)


def _stated_size(data: bytes) -> tuple[int, int]:
    """Width and height in the header of a PNG, GIF or BMP; (-1, -1) for other bytes.

    PIL does not identify an image without pixels, so its size has to be read here.
    """
    for magic, layout, at in (
        (b"\x89PNG\r\n\x1a\n", ">II", 16),
        (b"GIF8", "<HH", 6),
        (b"BM", "<ii", 18),
    ):
        if data.startswith(magic) and len(data) >= at + struct.calcsize(layout):
            width, height = struct.unpack_from(layout, data, at)
            return width, height
    return -1, -1


def _rgb(image: Image) -> Image:
    from PIL import Image as pil

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _eight_bit(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        drawn = image.convert("RGBA")
        ground = pil.new("RGBA", drawn.size, "white")
        ground.alpha_composite(drawn)
        return ground.convert("RGB")
    return image.convert("RGB")


def _eight_bit(image: Image) -> Image:
    """16-bit grey scaled to 8 bits; PIL's own conversion clips it to white."""
    import numpy as np
    from PIL import Image as pil

    values = np.asarray(image).astype(np.float64)
    return pil.fromarray(np.clip(np.rint(values / 257), 0, 255).astype(np.uint8))
