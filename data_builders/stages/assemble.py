"""Finished samples become files: records in EasyEdit's fields, their images, parquet; audited."""

from __future__ import annotations

import json
import logging
import os
import posixpath
import shutil
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from data_builders.builds import Build, StageReport
from data_builders.pictures import SEPARATOR, Pictures
from data_builders.progress import bar_of
from data_builders.samples import Rejected, Sample
from data_builders.sources.easyedit import NO_PREDICTION
from editing.datasets import FIELDS, IMAGES, write_items
from mmtune.data.records import ImageProblem
from mmtune.runs import write_folder, write_text

if TYPE_CHECKING:
    from editing.audit import Audit

log = logging.getLogger(__name__)

DATA, PICTURED = "data", "images"  # folders: of all files, and in it of pictures
CARD, GALLERY, DEFECTS = "README.md", "gallery.html", "defects.jsonl"
TRAIN = "train"
CROSSES, IN_SCOPE = "image in two splits", "locality image is in scope"
MEANINGS = {
    CROSSES: "the same picture, by its bytes, is in a record of another split",
    IN_SCOPE: "m_loc is the generality image of a record",
}


@dataclass(frozen=True)
class AssembleOptions:
    """How finished samples become files.

    Attributes:
        images: "link" puts hard links into data/images where the file system allows, and copies
            elsewhere; "copy" copies; "reference" leaves images where they are, which needs all of
            them below one folder.
        check_images: read every image: what has the same bytes is one image, and the audit decodes
            each. False is for records whose images are not at hand; it needs images: reference.
        defective: "leave out" sets records aside that have a defect by themselves, and counts
            them; "keep" writes them, and the audit tells.
        parquet: a copy for `datasets.load_dataset`, with pictures inside or their paths.
        gallery: records shown on gallery.html.
        language: of the texts, for the data card.
        licence: of the whole set, for the data card, as Hugging Face spells it.
    """

    images: Literal["link", "copy", "reference"] = "link"
    check_images: bool = True
    defective: Literal["leave out", "keep"] = "leave out"
    parquet: Literal["images", "paths", "none"] = "images"
    gallery: Annotated[int, Field(ge=0)] = 24
    language: list[str] = field(default_factory=lambda: ["en"])
    licence: str = "other"

    def __post_init__(self) -> None:
        if not self.check_images and self.images != "reference":
            text = f"check_images: false needs images: reference, got images: {self.images}"
            raise ValueError(text)
        if not self.check_images and self.parquet == "images":
            raise ValueError("check_images: false needs parquet: paths or none, got images")


@dataclass(frozen=True)
class Defect:
    """What is wrong with a record that was written."""

    split: str
    record: int
    id: str
    kind: str
    text: str


@dataclass(frozen=True)
class Assembled:
    """What was written.

    Attributes:
        files: split -> its JSON file.
        images: folder that image paths in it are relative to.
        samples: split -> its samples, in the order of the file.
        rejected: samples that were left out here.
        audits: split -> what the audit of its file found.
        defects: of the records written, with those between splits; empty for a good set.
        pictures: how many different pictures the records name.
        parquet: the parquet files.
    """

    files: dict[str, Path]
    images: Path
    samples: dict[str, list[Sample]]
    rejected: list[Rejected]
    audits: dict[str, Audit]
    defects: list[Defect]
    pictures: int
    parquet: list[Path]

    @property
    def records(self) -> int:
        """Of all splits."""
        return sum(map(len, self.samples.values()))

    def report(self) -> StageReport:
        """How it went, as the stages before report it."""
        broken = Counter(r.reason for r in self.rejected if r.fault)
        unfit = Counter(r.reason for r in self.rejected if not r.fault)
        given = self.records + len(self.rejected)
        return StageReport("assemble", "assemble", "files", {}, given, self.records, unfit, broken)


def assemble(build: Build, samples: Sequence[Sample]) -> Assembled:
    """Write the set, its data card, its gallery, and defects.jsonl where there are any.

    Args:
        build: with the reports of all stages; manifest.json is in its folder.
        samples: finished, in the order of the source.

    Returns:
        What was written; with `defects` it should not be used as it is.

    Raises:
        ValueError, OSError: as `write_set` does.
    """
    from data_builders.card import render_card
    from data_builders.config import to_yaml
    from data_builders.gallery import render_gallery

    options: AssembleOptions = build.config.assemble
    found = write_set(samples, options, build.pictures, build.folder)
    config = to_yaml(build.config)
    path = build.folder / "manifest.json"
    manifest = json.loads(path.read_text("utf-8")) if path.exists() else {}
    write_text(build.folder / CARD, render_card(build, found, config, manifest))
    page = render_gallery(build, found, options.gallery, config, manifest)
    write_text(build.folder / GALLERY, page)
    _write_defects(build.folder / DEFECTS, found.defects)
    return found


def write_set(
    samples: Sequence[Sample], options: AssembleOptions, pictures: Pictures, folder: Path
) -> Assembled:
    """Write samples as files below `folder`/data, whole or not at all, and audit them.

    Args:
        samples: with split, both keepers and both images; the order is that of the files.
        options: see its class.
        pictures: where their images are.
        folder: of the build.

    Raises:
        ValueError: images: reference with images in several folders.
        OSError: a file that cannot be written, such as on a full disk; what was there stays.
    """
    places, broken = _places(samples, options, pictures)
    rejected = [broken[sample.id] for sample in samples if sample.id in broken]
    whole = [sample for sample in samples if sample.id not in broken]
    splits, left_out = _splits(whole, places, options.defective == "leave out")
    for stale in folder.glob(f".{DATA}.partial-*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    fill = partial(_fill, splits=splits, places=places, options=options, pictures=pictures)
    write_folder(folder / DATA, fill)
    root = folder / DATA if options.images != "reference" else _one_root(samples, pictures)
    files = {split: folder / DATA / f"{split}.json" for split in splits}
    audits = _audits(files, root if options.check_images else None)
    items = {split: [item for _, item in pairs] for split, pairs in splits.items()}
    kept = {split: [sample for sample, _ in pairs] for split, pairs in splits.items()}
    return Assembled(
        files=files,
        images=root,
        samples=kept,
        rejected=rejected + left_out,
        audits=audits,
        defects=list(_defects(audits, kept)) + list(_between(items, kept)),
        pictures=len({item[n] for own in items.values() for item in own for n in IMAGES}),
        parquet=sorted((folder / DATA).glob("*.parquet")),
    )


def _write_defects(path: Path, defects: Sequence[Defect]) -> None:
    """One a line; no file where there is none."""
    if defects:
        write_text(path, "".join(json.dumps(vars(defect)) + "\n" for defect in defects))
    else:
        path.unlink(missing_ok=True)


def item_of(sample: Sample, places: Mapping[str, str]) -> dict[str, Any]:
    """The record of a sample: the eleven fields, its id, and what else its source says.

    Args:
        sample: what it has no value for is empty.
        places: reference of an image -> its path in the file.
    """
    text, image = sample.text_locality, sample.image_locality
    values = (
        sample.question, sample.prediction, sample.target, sample.rephrase,
        places.get(sample.image, ""), places.get(sample.image_rephrase, ""),
        text.question if text else "", text.answer if text else "",
        places.get(image.image, "") if image else "",
        image.question if image else "", image.answer if image else "",
    )  # fmt: skip
    item = dict(zip(FIELDS, values, strict=True))
    if sample.fields.get(NO_PREDICTION):
        del item["pred"]
    rest = {k: v for k, v in sample.fields.items() if k not in (*FIELDS, NO_PREDICTION)}
    return item | {"id": sample.id} | rest


def references_of(sample: Sample) -> list[str]:
    """References of the images of a sample's record; one that it lacks is left out."""
    keeper = sample.image_locality
    every = (sample.image, sample.image_rephrase, keeper.image if keeper else "")
    return [reference for reference in every if reference]


def _places(
    samples: Sequence[Sample], options: AssembleOptions, pictures: Pictures
) -> tuple[dict[str, str], dict[str, Rejected]]:
    """(reference -> path in the file, id of a sample with an unreadable image -> why).

    References to equal bytes have one path: that of the first.
    """
    places: dict[str, str] = {}
    first: dict[str, str] = {}
    taken: set[str] = set()
    broken: dict[str, Rejected] = {}
    with bar_of("assemble", len(samples), "sample") as bar:
        for sample in samples:
            bar.update()
            for reference in references_of(sample):
                if reference in places or sample.id in broken:
                    continue
                try:
                    same = pictures.digest(reference) if options.check_images else reference
                except ImageProblem as error:
                    broken[sample.id] = Rejected(sample.id, error.reason, error.text, fault=True)
                    continue
                if same not in first:
                    first[same] = _path(reference, same, options, taken)
                    taken.add(first[same])
                places[reference] = first[same]
    return places, broken


def _path(reference: str, same: str, options: AssembleOptions, taken: Collection[str]) -> str:
    """Where a picture goes: below its root's name, called as it was."""
    root, _, name = reference.partition(SEPARATOR)
    if options.images == "reference":
        return name
    path = posixpath.join(PICTURED, root, posixpath.normpath(name).lstrip("/"))
    if path not in taken:
        return path
    return posixpath.join(posixpath.dirname(path), f"{same}-{posixpath.basename(path)}")


def _splits(
    samples: Sequence[Sample], places: Mapping[str, str], leave_out: bool
) -> tuple[dict[str, list[tuple[Sample, dict[str, Any]]]], list[Rejected]]:
    """(split -> its samples with their records, samples left out); "train" is first."""
    from editing.audit.auditing import duplicates, record_findings, sorted_out

    names = sorted({s.split for s in samples}, key=lambda name: (name != TRAIN, name))
    found: dict[str, list[tuple[Sample, dict[str, Any]]]] = {}
    rejected = []
    for name in names:
        own = [(s, item_of(s, places)) for s in samples if s.split == name]
        good, findings = sorted_out([item for _, item in own])
        findings += [f for n, item in good.items() for f in record_findings(n, item)]
        wrong = {f.record: f for f in reversed(findings)}
        left = {n: item for n, item in good.items() if n not in wrong}
        wrong |= {f.record: f for f in duplicates(left)}
        if leave_out:
            rejected += [
                Rejected(own[n][0].id, f.kind, f"{f.field}: {f.text}")
                for n, f in sorted(wrong.items())
            ]
            own = [pair for n, pair in enumerate(own) if n not in wrong]
        found[name] = own
    return found, rejected


def _fill(
    to: Path,
    splits: Mapping[str, Sequence[tuple[Sample, dict[str, Any]]]],
    places: dict[str, str],
    options: AssembleOptions,
    pictures: Pictures,
) -> None:
    """Write the files of all splits into an empty folder."""
    from data_builders.parquet import write_parquet

    sources = {path: reference for reference, path in reversed(places.items())}
    root = to
    if options.images == "reference":
        root = _one_root([sample for own in splits.values() for sample, _ in own], pictures)
    else:
        items = [item for own in splits.values() for _, item in own]
        for path in dict.fromkeys(item[name] for item in items for name in IMAGES if item[name]):
            _put(pictures.file(sources[path]).path(), to / path, options.images == "link")
    for split, own in splits.items():
        items = [item for _, item in own]
        write_items(to / f"{split}.json", items)
        if options.parquet != "none" and items:
            write_parquet(items, to, split, root, options.parquet)


def _put(source: str, path: Path, link: bool) -> None:
    """A hard link where it may be one and can, else a copy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(source, path)
            return
        except OSError as error:  # another file system, or one without links
            log.debug("%s is copied: %s", source, error)
    shutil.copyfile(source, path)


def _one_root(samples: Sequence[Sample], pictures: Pictures) -> Path:
    """The one folder that all images are below. Raises ValueError where there are several."""
    names = {r.partition(SEPARATOR)[0] for sample in samples for r in references_of(sample)}
    folders = {name: Path(pictures.file(f"{name}{SEPARATOR}").root) for name in sorted(names)}
    if len({folder.resolve() for folder in folders.values()}) > 1:
        several = ", ".join(f"{name} ({folder})" for name, folder in folders.items())
        raise ValueError(
            "assemble.images: reference needs every image below one folder, got those of "
            f"{several}. Take link or copy."
        )
    return next(iter(folders.values()), Path("."))


def _audits(files: Mapping[str, Path], images: Path | None) -> dict[str, Audit]:
    from editing.audit import audit

    against = files.get(TRAIN)
    root = None if images is None else str(images)
    return {
        split: audit(
            str(path),
            against=None if split == TRAIN or against is None else str(against),
            images=root,
            progress=sys.stderr.isatty(),
        )
        for split, path in files.items()
    }


def _defects(audits: Mapping[str, Audit], kept: Mapping[str, Sequence[Sample]]) -> Iterator[Defect]:
    for split, found in audits.items():
        for f in found.findings:
            yield Defect(split, f.record, kept[split][f.record].id, f.kind, f"{f.field}: {f.text}")


def _between(
    items: Mapping[str, Sequence[Mapping[str, Any]]], kept: Mapping[str, Sequence[Sample]]
) -> Iterator[Defect]:
    """What an audit of one file does not see: generality images, and all pairs of splits."""
    homes: dict[str, set[str]] = {}  # image -> splits that have it
    for split, own in items.items():
        for item in own:
            for name in IMAGES:
                homes.setdefault(item[name], set()).add(split)
    for split, own in items.items():
        scope = {item["image_rephrase"] for item in own}
        for number, item in enumerate(own):
            identity = kept[split][number].id
            for name in IMAGES:
                others = ", ".join(sorted(homes[item[name]] - {split}))
                if others:
                    text = f"{name}: {item[name]!r}, also in {others}"
                    yield Defect(split, number, identity, CROSSES, text)
            if item["m_loc"] in scope:
                text = f"m_loc: {item['m_loc']!r}"
                yield Defect(split, number, identity, IN_SCOPE, text)
