"""E-VQA, E-IC and VLKEB, the edit records that people share: read, checked and written.

All three are a JSON list of mappings. `src` is asked about `image`, the model said `pred` and is to
say `alt`. `rephrase` is `src` in other words and `image_rephrase` another image of the same thing:
`alt` is right for both. `loc`, `loc_ans` (no image) and `m_loc`, `m_loc_q`, `m_loc_a` (image,
question, answer) must not be touched. VLKEB may add `port_new`: questions whose answer follows.
Texts are taken as they stand; `mmtune audit` finds and mends what is wrong with them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from editing.requests import EditRecord, EditRequest, Probe
from mmtune.data.checking import Checked, faults, settle
from mmtune.data.options import OnError
from mmtune.data.readers.json_files import image_root, load_json, wrong_shape
from mmtune.data.records import DataError, ImageFile, MediaRef, Problem
from mmtune.data.texts import normalised
from mmtune.runs import write_text

FIELDS = (
    "src", "pred", "alt", "rephrase", "image", "image_rephrase", "loc", "loc_ans", "m_loc",
    "m_loc_q", "m_loc_a",
)  # fmt: skip
IMAGES = ("image", "image_rephrase", "m_loc")
TEXTS = tuple(name for name in FIELDS if name not in IMAGES)
PORTABILITY = "port_new"
DEPTH = 50  # levels of mappings and lists that an item may have
STAND_INS = "stand_in_images"  # the label in `EditRecord.fields`
PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
ADVICE = (
    "Mend them (mmtune audit FILE --fix OUT writes a clean copy), or leave bad records out with "
    "on_error: skip."
)
Refer = Callable[[str], ImageFile]


@dataclass(frozen=True)
class Fault:
    """What is wrong with one field of one item: the kind (a few fixed texts), and what exactly."""

    reason: str
    field: str
    text: str


@dataclass(frozen=True)
class StandIn(ImageFile):
    """Another picture in the place of an image that is not at hand.

    Attributes:
        stands_for: the path of the image as the data set has it.
    """

    stands_for: str = ""


def read_records(
    path: str | Path,
    images: str | Path | None = None,
    stand_ins: str | Path | None = None,
    limit: int | None = None,
) -> Iterator[EditRecord | Problem]:
    """Read a file of edit records; images are not opened yet.

    Args:
        path: the JSON file.
        images: folder that image paths are relative to and may not leave; None means the file's.
        stand_ins: folder of pictures to show in the place of the images, see `stand_in_for`.
        limit: read only the first records.

    Yields:
        A record, whose id is its number in the file; or what is wrong with one.

    Raises:
        DataError: the file is missing or no JSON list, or the folder of stand-ins has no pictures.
    """
    refer = _refer(str(path), images, stand_ins)
    for number, item in itertools.islice(enumerate(load_items(path)), limit):
        yield record_of(item, refer, f"{path}, record {number}", str(number))


def load_records(
    path: str | Path,
    images: str | Path | None = None,
    stand_ins: str | Path | None = None,
    on_error: OnError = "raise",
    limit: int | None = None,
    progress: bool = True,
) -> Checked:
    """Read a file of edit records and decode every image once.

    Args:
        path, images, stand_ins, limit: as in `read_records`.
        on_error: "raise" lists all bad records; "skip" leaves them out, logs and counts them.
        progress: draw a progress bar.

    Raises:
        DataError: as `read_records` does; bad records with on_error "raise"; no record is left.
    """
    every = list(read_records(path, images, stand_ins, limit))
    records = [item for item in every if isinstance(item, EditRecord)]
    files = (_file(ref) for record in records for ref in images_of(record).values())
    wrong = faults(files, progress, Path(path).name)
    verdicts = [item if isinstance(item, Problem) else _verdict(item, wrong) for item in every]
    good = [v for v in verdicts if isinstance(v, EditRecord)]
    problems = [v for v in verdicts if isinstance(v, Problem)]
    name = str(path)
    return replace(settle({name: (good, problems)}, on_error, ADVICE)[name], files=[name])


def write_records(path: str | Path, records: Sequence[EditRecord]) -> None:
    """Write records as a file that `read_records` and other tools read, whole or not at all.

    Ids become the numbers in the new file. Stand-ins are written as what they stand for.

    Raises:
        DataError: records that the format cannot hold, such as two rephrases of one question.
    """
    items, problems = [], []
    for record in records:
        try:
            items.append(item_of(record))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems, "A record has one probe of each kind and images in files.")
    write_items(path, items)


def load_items(path: str | Path) -> list[Any]:
    """The items of a file as they stand. Raises DataError: missing, or not a JSON list."""
    document = load_json(str(path))
    if not isinstance(document, list):
        raise wrong_shape(str(path), "a list of edit records", document)
    return document


def write_items(path: str | Path, items: Sequence[Any]) -> None:
    """Write items as they stand, whole or not at all; the folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # Escapes keep every string that JSON can hold, lone surrogates too.
    write_text(Path(path), json.dumps(list(items), indent=4) + "\n")


def record_of(item: Any, refer: Refer, where: str, identity: str) -> EditRecord | Problem:
    """The record of one item, or what is wrong with it.

    Args:
        item: what stands in the file.
        refer: the image of a path.
        where: names the file and the place in it.
        identity: the record's id.
    """
    for fault in faults_of(item):
        return Problem(where, fault.reason, f"{fault.field}: {fault.text}")
    image, other, around = (refer(item[name]) for name in IMAGES)
    question, target = item["src"], item["alt"]
    rest = {k: v for k, v in item.items() if k not in FIELDS and k != PORTABILITY}
    label = {
        name: ref.name
        for name, ref in zip(IMAGES, (image, other, around), strict=True)
        if isinstance(ref, StandIn)
    }
    return EditRecord(
        request=EditRequest(question, target, image, identity),
        prediction=item.get("pred"),
        text_generality=(Probe(item["rephrase"], target, image),),
        image_generality=(Probe(question, target, other),),
        text_locality=(Probe(item["loc"], item["loc_ans"]),),
        image_locality=(Probe(item["m_loc_q"], item["m_loc_a"], around),),
        portability=tuple(_hop(hop, image) for hop in item.get(PORTABILITY, ())),
        id=identity,
        where=where,
        fields=rest | ({STAND_INS: label} if label else {}),
    )


def item_of(record: EditRecord) -> dict[str, Any]:
    """The item that `record_of` makes into `record`.

    Raises:
        DataError: the format cannot hold the record; the message says what it has no place for.
    """
    try:
        refs = images_of(record)
        names = {name: _path(ref) for name, ref in refs.items()}
        text, untouched = _one(record, "text_generality"), _one(record, "text_locality")
    except ValueError as error:
        raise _cannot_hold(record, str(error)) from None
    known = {names[name]: ref for name, ref in refs.items()}
    around = record.image_locality[0]
    item = {
        "src": record.request.question,
        "pred": record.prediction,
        "alt": record.request.target,
        "rephrase": text.question,
        "image": names["image"],
        "image_rephrase": names["image_rephrase"],
        "loc": untouched.question,
        "loc_ans": untouched.answer,
        "m_loc": names["m_loc"],
        "m_loc_q": around.question,
        "m_loc_a": around.answer,
    }
    if record.prediction is None:
        del item["pred"]
    hops = [{**p.fields, "port_q": p.question, "port_a": p.answer} for p in record.portability]
    item |= {PORTABILITY: hops} if hops else {}
    made = any(isinstance(ref, StandIn) for ref in refs.values())
    item |= {k: v for k, v in record.fields.items() if not (made and k == STAND_INS)}
    _check_same(record, record_of(item, known.__getitem__, record.where, record.id))
    return item


def faults_of(item: Any) -> list[Fault]:
    """What keeps an item of a file from being an edit record; empty for a good one."""
    if _depth_over(item, DEPTH):
        return [Fault("malformed record", "record", f"nested over {DEPTH} levels deep")]
    if not isinstance(item, dict):
        return [Fault("malformed record", "record", f"expected a mapping, got {item!r:.60}")]
    found = [f for name in FIELDS for f in _text_faults(item, name, name)]
    found += _portability_faults(item[PORTABILITY]) if PORTABILITY in item else []
    if not found and nothing_to_edit(item):
        text = f"the model says {item['pred']!r:.60} already, the target is {item['alt']!r:.60}"
        return [Fault("nothing to edit", "alt", text)]
    return found


def nothing_to_edit(item: Mapping[str, Any]) -> bool:
    """Whether the target is what the model says anyway, but for case, blanks and a full stop."""
    return "pred" in item and normalised(item["pred"]) == normalised(item["alt"])


def images_of(record: EditRecord) -> dict[str, ImageFile]:
    """The images of a record by field. Raises ValueError where one is not a single file."""
    return {
        "image": _in_file(record.request.image, "request"),
        "image_rephrase": _in_file(_one(record, "image_generality").image, "image_generality"),
        "m_loc": _in_file(_one(record, "image_locality").image, "image_locality"),
    }


def stand_in_for(name: str, folder: str, pictures: Sequence[str]) -> StandIn:
    """The picture shown for the image `name`: the same in every file, run and machine.

    Args:
        name: path of the image as the data set has it.
        folder: where the stand-ins are.
        pictures: their names below it, sorted.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return StandIn(folder, pictures[int.from_bytes(digest[:8], "big") % len(pictures)], name)


def stand_in_note(records: Sequence[EditRecord]) -> str:
    """What every output about these records must say: nothing where all images are their own."""
    made = sum(STAND_INS in record.fields for record in records)
    if not made:
        return ""
    return (
        f"STAND-IN IMAGES: {made:,} of {len(records):,} records show other pictures than those of "
        "the data set; these numbers say nothing about it."
    )


def _refer(path: str, images: str | Path | None, stand_ins: str | Path | None) -> Refer:
    if stand_ins is None:
        root = image_root(None if images is None else str(images), path)
        return lambda name: ImageFile(root, name)
    if images is not None:
        text = "images and stand_ins are both set; own images and stand-ins are never mixed"
        raise DataError([Problem(path, "two folders of images", text)])
    folder = str(stand_ins)
    found = (os.path.relpath(p, folder) for p in Path(folder).rglob("*") if p.is_file())
    pictures = sorted(Path(p).as_posix() for p in found if p.lower().endswith(PICTURES))
    if not pictures:
        text = f"expected files ending in {', '.join(PICTURES)}"
        raise DataError([Problem(folder, "no stand-in images", text)])
    return lambda name: stand_in_for(name, folder, pictures)


def _hop(hop: Mapping[str, Any], image: MediaRef) -> Probe:
    rest = {k: v for k, v in hop.items() if k not in ("port_q", "port_a")}
    return Probe(hop["port_q"], hop["port_a"], image, rest)


def _depth_over(value: Any, limit: int) -> bool:
    """Whether JSON is nested deeper than `limit`, found without recursion."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        holders = [v.values() if isinstance(v, dict) else v for v in level]
        level = [v for h in holders for v in h if isinstance(v, dict | list)]
    return bool(level)


def _text_faults(item: Mapping[str, Any], name: str, shown: str) -> list[Fault]:
    """Every field is a text and not blank; only `pred` may be absent, or that of a silent model."""
    if name not in item:
        return [] if name == "pred" else [Fault("missing field", shown, "it is absent")]
    value = item[name]
    if not isinstance(value, str):
        return [Fault("malformed record", shown, f"expected text, got {value!r:.60}")]
    if value.strip() or name == "pred":
        return []
    return [Fault("empty target" if name == "alt" else "empty field", shown, f"it is {value!r}")]


def _portability_faults(hops: Any) -> list[Fault]:
    if not isinstance(hops, list) or not hops:
        text = f"expected a list with questions, got {hops!r:.60}"
        return [Fault("malformed record", PORTABILITY, text)]
    found = []
    for number, hop in enumerate(hops):
        shown = f"{PORTABILITY}[{number}]"
        if not isinstance(hop, dict):
            text = f"expected a mapping, got {hop!r:.60}"
            found.append(Fault("malformed record", shown, text))
            continue
        for name in ("port_q", "port_a"):
            found += _text_faults(hop, name, f"{shown}.{name}")
    return found


def _verdict(record: EditRecord, wrong: Mapping[Any, Any]) -> EditRecord | Problem:
    for name, ref in images_of(record).items():
        fault = wrong[_file(ref)]
        if fault is not None:
            return Problem(record.where, fault.reason, f"{name}: {fault.text}")
    return record


def _file(ref: ImageFile) -> ImageFile:
    """The file itself, so that one stand-in of many images is decoded once."""
    return ImageFile(ref.root, ref.name)


def _one(record: EditRecord, name: str) -> Probe:
    probes = getattr(record, name)
    if len(probes) != 1:
        raise ValueError(f"{name} has {len(probes)} probes, expected one")
    return probes[0]


def _in_file(ref: MediaRef | None, name: str) -> ImageFile:
    if not isinstance(ref, ImageFile):
        raise ValueError(f"{name} has {'no image' if ref is None else 'an image in no file'}")
    return ref


def _path(ref: ImageFile) -> str:
    return ref.stands_for if isinstance(ref, StandIn) else ref.name


def _cannot_hold(record: EditRecord, text: str) -> DataError:
    where = record.where or f"record {record.id}"
    return DataError([Problem(where, "the format cannot hold the record", text)])


def _check_same(record: EditRecord, back: EditRecord | Problem) -> None:
    if isinstance(back, Problem):
        raise _cannot_hold(record, f"{back.reason}: {back.text}")
    own = replace(record, request=replace(record.request, id=record.id))
    other = [f.name for f in fields(own) if getattr(own, f.name) != getattr(back, f.name)]
    if other:
        raise _cannot_hold(record, f"it has no place for something in {', '.join(other)}")
