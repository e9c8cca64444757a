from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mmtune.data import ImageBytes, ImageProblem
from mmtune.data.images import load_image
from tests.data.pictures import encoded


def reloaded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return load_image(ImageBytes(buffer.getvalue()))


def test_orientation_is_applied():
    image = Image.new("RGB", (6, 4), "white")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored picture must be turned 90 degrees clockwise to be upright
    turned = reloaded(image, exif=exif)
    assert turned.size == (4, 6)
    assert turned.getpixel((3, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "P":
        palette = Image.new("P", (2, 1), 0)
        palette.putpalette([10, 20, 30, 0, 0, 0])
        palette.putpixel((1, 0), 1)
        loaded = reloaded(palette, transparency=0)
    else:
        loaded = reloaded(image.convert(mode))
    assert loaded.mode == "RGB"
    assert loaded.getpixel((0, 0)) == (255, 255, 255)
    assert loaded.getpixel((1, 0)) == (0, 0, 0)


def test_half_transparent_is_a_mean_with_white():
    loaded = reloaded(Image.new("RGBA", (1, 1), (0, 100, 255, 128)))
    expected = np.array([0, 100, 255]) * 128 / 255 + 255 * 127 / 255
    assert np.abs(np.array(loaded.getpixel((0, 0))) - expected).max() <= 1


def test_sixteen_bit_grey_keeps_its_range():
    values = np.array([[0, 257 * 100, 65535]], np.uint16)
    loaded = reloaded(Image.fromarray(values))
    assert [loaded.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (100,) * 3, (255,) * 3]


def test_opaque_palettes_grey_and_cmyk():
    assert reloaded(Image.new("RGB", (3, 3), (9, 8, 7)).quantize()).getpixel((1, 1)) == (9, 8, 7)
    assert reloaded(Image.new("L", (3, 3), 77)).getpixel((1, 1)) == (77, 77, 77)
    assert reloaded(Image.new("CMYK", (8, 8)), "TIFF").getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero-size image"),
        (b"GIF89a\x00\x00\x00\x00\x00\x00\x00;", "zero-size image"),
        (encoded()[:16] + bytes(8) + encoded()[24:], "zero-size image"),
        (b"hello", "not an image"),
        (encoded(size=(50, 50), kind="JPEG")[:400], "truncated image"),
        (encoded(size=(50, 50))[:90], "truncated image"),
    ],
)
def test_bad_images_by_reason(data, reason):
    with pytest.raises(ImageProblem) as caught:
        load_image(ImageBytes(data))
    assert caught.value.reason == reason
