"""Probe sets in layouts that people have: POPE, MME, VLMEvalKit's TSV."""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmtune.data.records import Problem
from mmtune.probe.items import Found, ItemSet, checked_items, item_of, read_items

PERCEPTION_ENDS = (" Please answer yes or no.", " Please answer yes or no")


def read_pope(path: str, images: str | None = None) -> ItemSet:
    """POPE's JSON lines {question_id, image, text, label}; the file's name says how it was drawn.

    Raises:
        DataError: lines that are none of these.
    """
    file = Path(path)
    kind = next((k for k in ("random", "popular", "adversarial") if k in file.stem), "")
    found: list[Found] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            where, raw = f"{file}:{number}", _json(line)
            known = {
                "id": raw.get("question_id", number),
                "images": [raw.get("image", "")],
                "question": raw.get("text"),
                "answer": raw.get("label"),
                "category": "objects",
                "subcategory": f"POPE {kind}".strip(),
            }
            found.append((where, item_of(known, where)))
    return ItemSet(file.stem, checked_items(found, file), Path(images or file.parent))


def read_mme(path: str, images: str | None = None) -> ItemSet:
    """MME's folders, one a task, with NAME.txt (lines "question<TAB>answer") and NAME.jpg.

    Some tasks keep them in `questions_answers_YN` and `images`. The two questions about an image
    belong together: both right is what MME's acc+ counts.

    Raises:
        DataError: a line without an answer, no image, or no task at all.
    """
    root = Path(path)
    found: list[Found] = []
    for file in sorted(root.glob("*/*.txt")) + sorted(root.glob("*/questions_answers_YN/*.txt")):
        task = file.relative_to(root).parts[0]
        picture = _beside(file)
        if picture is None:
            problem = Problem(str(file), "missing image", f"no picture called {file.stem}")
            found.append((str(file), problem))
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            question, _, answer = line.rstrip().rpartition("\t")
            for end in PERCEPTION_ENDS:
                question = question.removesuffix(end)
            known = {
                "id": f"{task}/{file.stem}/{number}",
                "images": [picture.relative_to(images or root).as_posix()],
                "question": question,
                "answer": answer.strip().lower(),
                "category": task,
                "pair_id": f"{task}/{file.stem}",
            }
            found.append((where, item_of(known, where)))
    return ItemSet(root.name, checked_items(found, root), Path(images or root))


def read_tsv(path: str, images: str | None = None) -> ItemSet:
    """VLMEvalKit's table: index, question, answer, A, B, C, D, category, and image in base64.

    Pictures are written into the folder `images` (beside the file unless given). A short text in
    the column `image` is the index of the row that holds the picture.

    Raises:
        DataError: rows without a question, an answer, or a picture that can be read.
    """
    file = Path(path)
    folder = Path(images or file.with_suffix(""))
    folder.mkdir(parents=True, exist_ok=True)
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    encoded = {row.get("index", ""): row.get("image") or "" for row in rows}
    found: list[Found] = []
    for number, row in enumerate(rows, 2):
        where = f"{file}:{number}"
        text = row.get("image") or ""
        text = encoded.get(text, text) if len(text) < 64 else text
        try:
            name = _write(base64.b64decode(text, validate=True), folder)
        except (binascii.Error, ValueError):
            problem = Problem(where, "bad picture", "expected base64 in the column image")
            found.append((where, problem))
            continue
        letters = [c for c in "ABCDEFGH" if (row.get(c) or "").strip()]
        answer = (row.get("answer") or "").strip()
        choices = [str(row[c]).strip() for c in letters]
        if answer in letters:
            answer = choices[letters.index(answer)]
        hint = (row.get("hint") or "").strip()
        question = (row.get("question") or "").strip()
        known = {
            "id": row.get("index") or str(number),
            "images": [name] if name else [],
            "question": f"{hint}\n{question}" if hint and hint != "nan" else question,
            "answer": answer,
            "choices": choices,
            "category": row.get("category") or file.stem,
            "subcategory": row.get("l2-category") or "",
        }
        found.append((where, item_of(known, where)))
    return ItemSet(file.stem, checked_items(found, file), folder)


READERS: dict[str, Callable[[str, str | None], ItemSet]] = {
    "jsonl": read_items,
    "pope": read_pope,
    "mme": read_mme,
    "tsv": read_tsv,
}


def _json(line: str) -> Mapping[str, Any]:
    try:
        raw = json.loads(line)
    except ValueError:
        raw = None
    return raw if isinstance(raw, dict) else {}


def _beside(file: Path) -> Path | None:
    folders = (file.parent, file.parent.parent / "images")
    names: Iterator[Path] = (
        folder / f"{file.stem}{end}" for folder in folders for end in (".jpg", ".png", ".jpeg")
    )
    return next((path for path in names if path.is_file()), None)


def _write(data: bytes, folder: Path) -> str:
    if not data:
        return ""
    ending = "png" if data.startswith(b"\x89PNG") else "jpg"
    name = f"{hashlib.sha256(data).hexdigest()[:16]}.{ending}"
    if not (folder / name).exists():
        partial = folder / f"{name}.partial"
        partial.write_bytes(data)
        partial.replace(folder / name)
    return name
