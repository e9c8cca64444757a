"""Build the `clipart` data sets of the zoo from Debian's openclipart packages.

    python -m data_builders.clipart --svg DIR --png DIR --out mmtune/zoo/data

DIR are the folders that hold the categories (`animals`, `food`, ...), as the packages
openclipart-svg and openclipart-png install them. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_builders.clipart_splits import SplitSizes, split_records
from data_builders.near_duplicates import picture_hash
from data_builders.sources.openclipart import (
    BrokenDrawing,
    DrawingText,
    RawDrawing,
    describe,
    is_public_domain,
    normalise,
    read_drawing,
)
from mmtune.runs import write_text

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from PIL.Image import Image

log = logging.getLogger(__name__)

LONGEST_SIDE = 128  # pixels
QUALITY = 85  # WebP
MAX_PIXELS = 64 * 2**20
MAX_PER_TITLE = 20


@dataclass(frozen=True)
class Record:
    """One drawing, ready to be written.

    Attributes:
        id: path of the SVG file below its root.
        text: what is said of it.
        picture: WebP.
        bits: `picture_hash` before compression.
        shipped_bits: `picture_hash` of what `picture` decodes to.
    """

    id: str
    text: DrawingText
    picture: bytes
    bits: np.ndarray = field(repr=False, compare=False)
    shipped_bits: np.ndarray = field(repr=False, compare=False)

    @property
    def category(self) -> str:
        """The top folder."""
        return self.id.split("/")[0]


@dataclass
class Rejections:
    """What was left out and why; `named` lists files for the reasons that mean damage."""

    counts: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)

    def add(self, reason: str, path: str, detail: str = "") -> None:
        """Count one left-out file; with `detail` it is also named in the log and the summary."""
        self.counts[reason] += 1
        if detail:
            self.named.append(f"{path}: {reason} ({detail})")
            log.warning("left out %s: %s (%s)", path, reason, detail)


def read_records(svg_root: Path, png_root: Path) -> tuple[list[Record], Rejections]:
    """Read every drawing below `svg_root`, with its picture below `png_root`.

    Returns:
        Records in order of path, and what was left out.

    Raises:
        FileNotFoundError: a folder is missing or holds no SVG file.
    """
    for root in (svg_root, png_root):
        if not root.is_dir():
            raise FileNotFoundError(
                f"{root} is no folder. Install openclipart-svg and openclipart-png, and give the "
                "folders that hold the categories (animals, food, ...)."
            )
    rejections = Rejections()
    drawings = _read_drawings(svg_root, rejections)
    records: list[Record] = []
    seen_pictures: set[bytes] = set()
    titles: Counter[str] = Counter()
    for drawing, text in zip(drawings, describe(drawings), strict=True):
        if text is None:
            rejections.add("no usable text", drawing.path)
            continue
        if titles[normalise(text.title)] >= MAX_PER_TITLE:
            rejections.add(f"more than {MAX_PER_TITLE} drawings of one title", drawing.path)
            continue
        record = _record(drawing, text, png_root, seen_pictures, rejections)
        if record is not None:
            titles[normalise(text.title)] += 1
            records.append(record)
    return records, rejections


def _read_drawings(svg_root: Path, rejections: Rejections) -> list[RawDrawing]:
    paths = sorted(svg_root.rglob("*.svg"), key=lambda path: path.as_posix())
    if not paths:
        raise FileNotFoundError(f"{svg_root} holds no .svg file: expected categories of drawings.")
    drawings: list[RawDrawing] = []
    for path in paths:
        relative = path.relative_to(svg_root).as_posix()
        if path.is_symlink():
            rejections.add("symbolic link to another drawing", relative)
            continue
        try:
            drawing = read_drawing(svg_root, path)
        except BrokenDrawing as error:
            rejections.add("broken SVG", relative, str(error))
            continue
        if is_public_domain(drawing):
            drawings.append(drawing)
        else:
            licence = drawing.licence or "no licence stated"
            rejections.add("not stated to be public domain", relative, licence)
    return drawings


def _record(
    drawing: RawDrawing,
    text: DrawingText,
    png_root: Path,
    seen_pictures: set[bytes],
    rejections: Rejections,
) -> Record | None:
    from PIL import Image
    from PIL.Image import DecompressionBombError

    path = png_root / Path(drawing.path).with_suffix(".png")
    if not path.is_file():
        rejections.add("no PNG of that name", drawing.path, path.name)
        return None
    try:
        image = _on_white(path)
    except (OSError, ValueError, SyntaxError, DecompressionBombError) as error:
        rejections.add("broken or too large PNG", drawing.path, str(error))
        return None
    bits = picture_hash(image)
    if bits is None:
        rejections.add("blank on white", drawing.path)
        return None
    digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
    if digest in seen_pictures:
        rejections.add("same pixels as another drawing", drawing.path)
        return None
    seen_pictures.add(digest)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=QUALITY, method=6)
    with Image.open(buffer) as shipped:
        shipped_bits = picture_hash(shipped.convert("RGB"))
    if shipped_bits is None:
        rejections.add("blank on white", drawing.path)
        return None
    return Record(drawing.path, text, buffer.getvalue(), bits, shipped_bits)


def _on_white(path: Path) -> Image:
    """The picture on white, longest side at most 128 pixels, RGB."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is stricter
        opened = Image.open(path)
    with opened:
        width, height = opened.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS}")
        drawn = opened.convert("RGBA")
    ground = Image.new("RGBA", drawn.size, "white")
    ground.alpha_composite(drawn)
    image = ground.convert("RGB")
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return image


def to_table(records: Sequence[Record]) -> pa.Table:
    """Records as a table that `datasets` reads with an Image column.

    Columns: image {bytes, path}, caption, title, keywords, description, category, id.
    """
    import pyarrow as pa

    names = [Path(r.id).with_suffix(".webp").name for r in records]
    pictures = [{"bytes": r.picture, "path": name} for r, name in zip(records, names, strict=True)]
    columns: dict[str, Any] = {
        "image": pa.array(
            pictures, pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
        ),
        "caption": pa.array([r.text.caption for r in records], pa.string()),
        "title": pa.array([r.text.title for r in records], pa.string()),
        "keywords": pa.array([list(r.text.keywords) for r in records], pa.list_(pa.string())),
        "description": pa.array([r.text.description for r in records], pa.string()),
        "category": pa.array([r.category for r in records], pa.string()),
        "id": pa.array([r.id for r in records], pa.string()),
    }
    features = {
        name: {"dtype": "string", "_type": "Value"}
        for name in ("caption", "title", "description", "category", "id")
    }
    info = {
        "info": {
            "features": {
                "image": {"_type": "Image"},
                "keywords": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
            }
            | features
        }
    }
    ordered = {name: info["info"]["features"][name] for name in columns}
    metadata = {"huggingface": json.dumps({"info": {"features": ordered}})}
    return pa.table(columns).replace_schema_metadata(metadata)


def write_table(table: pa.Table, path: Path) -> None:
    """Write parquet under a temporary name, then rename."""
    import pyarrow.parquet as pq

    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(table, temporary, compression="zstd", compression_level=9, row_group_size=256)
    os.replace(temporary, path)


def build(svg_root: Path, png_root: Path, out: Path, sizes: SplitSizes) -> dict[str, Any]:
    """Build every parquet file and `clipart.json`, the summary of counts.

    Args:
        svg_root: folder of categories of SVG files.
        png_root: folder of the same layout with PNG files.
        out: where the files go; made if missing.
        sizes: how many pairs the tests hold, and the seed.

    Returns:
        The summary: {"counts": {name-split: n}, "rejected": {reason: n}, "named": [...]}.
    """
    records, rejections = read_records(svg_root, png_root)
    out.mkdir(parents=True, exist_ok=True)
    splits, dropped = split_records(records, sizes)
    for reason, number in dropped.items():
        rejections.counts[reason] += number
    for name, chosen in splits.items():
        write_table(to_table([records[i] for i in chosen]), out / f"{name}.parquet")
    summary = {
        "counts": {name: len(chosen) for name, chosen in splits.items()},
        "rejected": dict(sorted(rejections.counts.items())),
        "named": rejections.named,
        "seed": sizes.seed,
    }
    write_text(out / "clipart.json", json.dumps(summary, indent=1) + "\n")
    return summary


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(prog="python -m data_builders.clipart", description=__doc__)
    parser.add_argument("--svg", type=Path, required=True, help="folder of openclipart-svg")
    parser.add_argument("--png", type=Path, required=True, help="folder of openclipart-png")
    parser.add_argument("--out", type=Path, required=True, help="where the parquet files go")
    parser.add_argument("--seed", type=int, default=0, help="of the splits (default 0)")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    summary = build(given.svg, given.png, given.out, SplitSizes(seed=given.seed))
    for part in ("counts", "rejected"):
        for name, number in summary[part].items():
            log.info("%s: %s %d", part, name, number)


if __name__ == "__main__":
    main()
