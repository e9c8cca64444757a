"""Icons of permissive licences as further training pictures, drawn from npm packages."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

# npm packages @iconify-json/NAME (icons.json holds the drawings); licence of each in the card.
SETS = (
    "emojione",
    "flat-color-icons",
    "fluent-color",
    "fluent-emoji-flat",
    "game-icons",
    "icon-park",
    "noto",
    "streamline-kameleon-color",
    "streamline-plump-color",
    "streamline-ultimate-color",
    "twemoji",
)
CACHE = "icons.parquet"
# Flags and keycaps say little, skin tones and hair repeat one drawing, the rest is a drawing style.
_SKIPPED = re.compile(
    r"flag|keycap|skin-tone|(medium|light|dark)$|medium-(light|dark)|^u[0-9a-f]{4}"
)
_STYLE = re.compile(r"(-(duo|flat|fill|line|outline|filled|color|alternate|[0-9]+))+$")


def read_icons(folder: Path, side: int) -> list[dict[str, Any]]:
    """Rows {name, image} of every icon below `folder`, drawn once and kept in its `CACHE`.

    Args:
        folder: below it the packages of `SETS` are unpacked, each in a folder of its own; or the
            cache alone.
        side: pixels of the square drawing, on white; only where it is drawn now.

    Raises:
        FileNotFoundError: a package is missing.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    cache = folder / CACHE
    if not cache.is_file():
        rows = [row for name in SETS for row in _draw(folder, name, side)]
        part = cache.with_suffix(".part")
        pq.write_table(pa.Table.from_pylist(rows), part)
        part.replace(cache)
    return pq.read_table(cache).to_pylist()


def plain_name(name: str) -> str | None:
    """`glass-of-milk-duo` -> `glass of milk`; None for an icon that is left out."""
    if _SKIPPED.search(name):
        return None
    words = _STYLE.sub("", name).replace("-", " ").strip()
    return words if len(words) > 1 else None


def _draw(folder: Path, package: str, side: int) -> Iterator[dict[str, Any]]:
    import resvg_py  # pyright: ignore[reportMissingImports] (only this recipe needs it)
    from PIL import Image

    found = sorted(folder.rglob(f"{package}/icons.json"))
    if not found:
        raise FileNotFoundError(
            f"no {package}/icons.json below {folder}: unpack the npm package "
            f"@iconify-json/{package} in {folder / package}."
        )
    content = json.loads(found[0].read_text(encoding="utf-8"))
    seen: set[str] = set()
    for name, icon in content["icons"].items():
        words = plain_name(name)
        if words is None or words in seen or icon.get("hidden"):
            continue
        seen.add(words)
        width = icon.get("width", content.get("width", 16))
        height = icon.get("height", content.get("height", 16))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" color="#222">{icon["body"]}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, background="#ffffff")
        with Image.open(io.BytesIO(bytes(png))) as drawn:
            packed = io.BytesIO()
            drawn.convert("RGB").resize((side, side)).save(packed, "WEBP", quality=85, method=6)
        yield {"name": words, "package": package, "image": packed.getvalue()}
    log.info("%s: %d icons", package, len(seen))
