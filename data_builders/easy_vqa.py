"""Build the `easy-vqa` data set of the zoo from the Python package easy-vqa.

    pip download --no-deps easy-vqa==1.0
    python -m data_builders.easy_vqa --wheel easy_vqa-1.0-py3-none-any.whl --out mmtune/zoo/data

One row an image, with all of its questions; the same wheel gives the same bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import random
import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_builders.clipart import write_table
from mmtune.runs import write_text

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

NAME = "easy-vqa"
LICENCE = f"{NAME}-LICENSE.txt"
SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
KINDS = ("shape", "color", "has-shape", "has-color", "lacks-shape", "lacks-color")
_SUBJECT = re.compile(rf"\b(?:a|no|the) ({'|'.join(SHAPES + COLORS)})\b")


class EasyVqaError(ValueError):
    """A wheel that is not what it should be; the message says what is wrong with it."""


@dataclass(frozen=True)
class Item:
    """One image with its questions, as the package numbers them.

    Attributes:
        id: `<split of the package>-<number of the image>`.
        picture: PNG.
        questions: (question, answer, kind) in the package's order.
        shape: of `SHAPES`; None where the questions do not give it away.
        color: of `COLORS`; likewise.
    """

    id: str
    picture: bytes
    questions: tuple[tuple[str, str, str], ...]
    shape: str | None
    color: str | None


def kind_of(question: str, answer: str) -> str:
    """What is asked, one of `KINDS`: "lacks-color" is whether a colour is absent.

    Raises:
        EasyVqaError: a question of none of these kinds.
    """
    if answer in SHAPES:
        return "shape"
    if answer in COLORS:
        return "color"
    subject = _SUBJECT.search(question)
    if subject is None or answer not in ("yes", "no"):
        raise EasyVqaError(f"no kind of question: {question!r} with the answer {answer!r}")
    negated = re.search(r"\b(no|not)\b", question) is not None
    what = "shape" if subject.group(1) in SHAPES else "color"
    return f"{'lacks' if negated else 'has'}-{what}"


def content(questions: Sequence[tuple[str, str, str]]) -> dict[str, str | None]:
    """The shape and the colour that an image's questions and answers give away.

    Raises:
        EasyVqaError: they contradict each other.
    """
    found: dict[str, set[str]] = {"shape": set(), "color": set()}
    for question, answer, kind in questions:
        what = kind.rpartition("-")[2]
        subject = _SUBJECT.search(question)
        if kind in found:
            found[kind].add(answer)
            if subject is not None:  # "what color is the circle?": there is a circle
                found["color" if kind == "shape" else "shape"].add(subject.group(1))
        elif subject is not None and (answer == "yes") == kind.startswith("has"):
            found[what].add(subject.group(1))
    if any(len(values) > 1 for values in found.values()):
        raise EasyVqaError(f"answers of one image contradict each other: {list(questions)}")
    return {what: next(iter(values), None) for what, values in found.items()}


def compact_png(data: bytes) -> bytes:
    """The same pixels as a PNG with a palette, where that is smaller."""
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(data)) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    colours, index = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    if len(colours) > 256:
        return data
    image = Image.fromarray(index.reshape(pixels.shape[:2]).astype(np.uint8))
    image.putpalette(colours.astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return min(buffer.getvalue(), data, key=len)


def read_items(wheel: zipfile.ZipFile, part: str) -> list[Item]:
    """The images of one of the package's two parts, in order of number.

    Args:
        wheel: the opened wheel.
        part: "train" or "test".

    Raises:
        EasyVqaError: a file is missing, or a question is of no known kind.
    """
    root = f"easy_vqa/data/{part}"
    try:
        listed = json.loads(wheel.read(f"{root}/questions.json"))
        asked: dict[int, list[tuple[str, str, str]]] = {}
        for question, answer, image in listed:
            kind = kind_of(question, answer)
            asked.setdefault(image, []).append((question, answer, kind))
        items = []
        for image in sorted(asked):
            picture = compact_png(wheel.read(f"{root}/images/{image}.png"))
            questions = tuple(asked[image])
            items.append(Item(f"{part}-{image}", picture, questions, **content(questions)))
    except KeyError as error:
        raise EasyVqaError(
            f"{wheel.filename}: {error.args[0]}. Expected the wheel of easy-vqa 1.0."
        ) from None
    return items


def to_table(items: Sequence[Item]) -> pa.Table:
    """Items as a table that `datasets` reads with an Image column.

    Columns: image {bytes, path}, questions [{question, answer, kind, id}], shape, color, id.
    """
    import pyarrow as pa

    text = pa.string()
    image = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", text)])
    keys = ("question", "answer", "kind", "id")
    asked = pa.list_(pa.struct([pa.field(key, text) for key in keys]))
    columns: dict[str, Any] = {
        "image": pa.array([{"bytes": i.picture, "path": f"{i.id}.png"} for i in items], image),
        "questions": pa.array(
            [
                [
                    dict(zip(keys, (*q, f"{item.id}-{n}"), strict=True))
                    for n, q in enumerate(item.questions)
                ]
                for item in items
            ],
            asked,
        ),
        "shape": pa.array([item.shape for item in items], text),
        "color": pa.array([item.color for item in items], text),
        "id": pa.array([item.id for item in items], text),
    }
    value = {"dtype": "string", "_type": "Value"}
    features: dict[str, Any] = dict.fromkeys(("shape", "color", "id"), value)
    features = {
        "image": {"_type": "Image"},
        "questions": {"feature": dict.fromkeys(keys, value), "_type": "List"},
    } | features
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(metadata)


def build(wheel: Path, out: Path, held: int, seed: int) -> dict[str, Any]:
    """Build the parquet files, the licence and `easy-vqa.json`, the summary.

    Args:
        wheel: of easy-vqa 1.0.
        out: where the files go; made if missing.
        held: images of the package's train part that become `val`.
        seed: decides which.

    Returns:
        The summary: {split: {"images": n, "questions": n, "kinds": {kind: n}}}.

    Raises:
        EasyVqaError: the wheel is not what it should be, or has fewer images than `held`.
    """
    with zipfile.ZipFile(wheel) as opened:
        trained, test = (read_items(opened, part) for part in ("train", "test"))
        licence = next((n for n in opened.namelist() if n.endswith(".dist-info/LICENSE")), None)
        if licence is None:
            raise EasyVqaError(f"{wheel}: no LICENSE. Expected the wheel of easy-vqa 1.0.")
        text = opened.read(licence).decode("utf-8")
    if not 0 < held < len(trained):
        raise EasyVqaError(f"val must have 1 to {len(trained) - 1} images, got {held}. Try 400.")
    chosen = {item.id for item in random.Random(seed).sample(trained, held)}
    splits = {
        "train": [item for item in trained if item.id not in chosen],
        "val": [item for item in trained if item.id in chosen],
        "test": test,
    }
    out.mkdir(parents=True, exist_ok=True)
    for split, items in splits.items():
        write_table(to_table(items), out / f"{NAME}-{split}.parquet")
    summary = {}
    for split, items in splits.items():
        kinds = Counter(kind for item in items for _, _, kind in item.questions)
        summary[split] = {
            "images": len(items),
            "questions": kinds.total(),
            "kinds": {kind: kinds[kind] for kind in KINDS},
        }
    write_text(out / LICENCE, text)
    write_text(out / f"{NAME}.json", json.dumps(summary, indent=1) + "\n")
    return summary


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(
        prog="python -m data_builders.easy_vqa",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--wheel", type=Path, required=True, help="the wheel of easy-vqa 1.0")
    parser.add_argument("--out", type=Path, required=True, help="where the parquet files go")
    parser.add_argument("--val", type=int, default=400, help="images of val (default 400)")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default 0)")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    for split, found in build(given.wheel, given.out, given.val, given.seed).items():
        log.info("%s: %s", split, found)


if __name__ == "__main__":
    main()
