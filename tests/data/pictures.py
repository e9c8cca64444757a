"""Small pictures and files in the formats that the readers read."""

from __future__ import annotations

import io
import json
import tarfile

from PIL import Image


def encoded(colour=(200, 30, 40), size=(12, 10), kind="PNG", **options):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed, size=(40, 30)):
    import numpy as np

    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def write_pictures(folder, names):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "JPEG" if name.endswith("jpg") else "PNG"
        path.write_bytes(encoded((20 * i % 256, 90, 255 - 10 * i), kind=kind))


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)
