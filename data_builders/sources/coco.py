"""COCO: captions_*.json, images that people described; instances_*.json, what can be seen on them.

Both are {"images": [{"id", "file_name", "license"}], "licenses": [{"id", "name"}], "annotations":
[…]}. An annotation is {"id", "image_id", "caption"} in the one file, and {"image_id",
"category_id", "area"} beside {"categories": [{"id", "name"}]} in the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_builders.pictures import Pictures
from data_builders.samples import Outcome, Rejected, Sample
from data_builders.sources.base import Source
from data_builders.sources.checks import fault_of, one_line, reference, settled
from mmtune.data.readers.json_files import image_root, load_json, wrong_shape
from mmtune.data.readers.vqav2 import SUBSET
from mmtune.data.records import DataError, Problem
from mmtune.suggestions import did_you_mean

PROMPT = "a photo of"  # what E-IC asks
UNWANTED = "none of the wanted categories"


@dataclass(frozen=True)
class CocoOptions:
    """Images with captions.

    Attributes:
        path: captions_val2014.json or another of its kind.
        images: folder of the images, or of folders named like val2014; None means the file's.
        instances: instances_val2014.json, which says what is on an image.
        categories: only images that show one of these (needs instances); empty takes all.
        prompt: what the model is asked.
        licence: of images whose own the file does not state, for the data card.
    """

    path: str
    images: str | None = None
    instances: str | None = None
    categories: list[str] = field(default_factory=list)
    prompt: str = PROMPT
    licence: str = ""

    def __post_init__(self) -> None:
        if self.categories and self.instances is None:
            raise ValueError(f"categories needs instances, got categories: {self.categories}")


class Coco(Source[CocoOptions]):
    """One sample an image, in the order of the file; its answers are all of its captions."""

    name = "coco"
    options = CocoOptions
    licence = "CC BY 4.0 (COCO captions)"

    def roots(self) -> Mapping[str, Path]:
        return {self.root: Path(image_root(self.settings.images, self.settings.path))}

    def files(self) -> list[str]:
        return [path for path in (self.settings.path, self.settings.instances) if path]

    def read(self, pictures: Pictures) -> Iterator[Outcome]:
        return settled(self._every(), pictures, self.settings.path)

    def _every(self) -> Iterator[Outcome]:
        path = self.settings.path
        document = _document(path)
        captions, wrong = _captions(document, path)
        yield from wrong
        shown = {} if self.settings.instances is None else categories(self.settings.instances)
        self._check_categories(shown)
        licences = {one.get("id"): one.get("name") for one in _mappings(document, "licenses")}
        match = SUBSET.search(Path(path).name)
        subset = match[0] if match else ""
        folder = f"{subset}/" if subset and (self.roots()[self.root] / subset).is_dir() else ""
        for number, image in enumerate(document["images"]):
            where = f"{path}, image {number}"
            if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
                text = f"expected {{id, file_name}}, got {image!r:.60}"
                yield fault_of(f"image {number}", Problem(where, "malformed record", text))
                continue
            own = captions.get(_number(image.get("id")), ())
            named = tuple(shown.get(_number(image.get("id")), ()))
            yield self._sample(image, own, named, folder, licences, where)

    def _sample(
        self,
        image: Mapping[str, Any],
        captions: tuple[str, ...],
        named: tuple[str, ...],
        folder: str,
        licences: Mapping[Any, Any],
        where: str,
    ) -> Outcome:
        identity, wanted = str(image.get("id")), self.settings.categories
        if not captions:
            return fault_of(identity, Problem(where, "record without caption"))
        if wanted and not set(wanted) & set(named):
            return Rejected(identity, UNWANTED, f"{where}: it shows {', '.join(named) or 'none'}")
        return Sample(
            id=identity,
            question=self.settings.prompt,
            image=reference(self.root, folder + image["file_name"]),
            answers=captions,
            captions=captions,
            concept=next((name for name in named if name in wanted or not wanted), ""),
            licence=str(licences.get(image.get("license")) or self.settings.licence),
            fields={"image_id": image.get("id")},
        )

    def _check_categories(self, shown: Mapping[int, list[str]]) -> None:
        known = sorted({name for names in shown.values() for name in names})
        for name in self.settings.categories:
            if name not in known:
                text = f"no image shows {name!r}; there are {', '.join(known)}."
                where = str(self.settings.instances)
                hint = did_you_mean(name, known)
                raise DataError([Problem(where, "unknown category", text + hint)])


def captions(path: str) -> dict[int, tuple[str, ...]]:
    """Image id -> its captions in the order of the file, each on one line; blank ones left out.

    Raises:
        DataError: no captions file.
    """
    return _captions(_document(path), path)[0]


def categories(path: str) -> dict[int, list[str]]:
    """Image id -> names of what is on it, by area, the largest first.

    Raises:
        DataError: no instances file.
    """
    document = _document(path)
    names = {one.get("id"): one.get("name") for one in _mappings(document, "categories")}
    areas: dict[int, dict[str, float]] = {}
    for one in _mappings(document, "annotations"):
        name, area = names.get(one.get("category_id")), one.get("area", 0)
        if isinstance(name, str) and isinstance(area, int | float):
            own = areas.setdefault(_number(one.get("image_id")), {})
            own[name] = own.get(name, 0.0) + area
    if not areas:
        raise wrong_shape(path, "annotations with category_id (COCO's instances)", document)
    return {image: sorted(own, key=lambda n: (-own[n], n)) for image, own in areas.items()}


def _captions(
    document: Mapping[str, Any], path: str
) -> tuple[dict[int, tuple[str, ...]], list[Rejected]]:
    """(image id -> captions, annotations that are none)."""
    images = {_number(one.get("id")) for one in _mappings(document, "images")}
    found: dict[int, list[str]] = {}
    wrong = []
    for number, one in enumerate(document["annotations"]):
        where = f"{path}, annotation {number}"
        text = one.get("caption") if isinstance(one, dict) else None
        if not isinstance(one, dict) or not isinstance(text, str):
            problem = Problem(where, "malformed record", f"expected a caption, got {one!r:.60}")
        elif _number(one.get("image_id")) not in images:
            problem = Problem(where, "caption of no image", f"image_id {one.get('image_id')!r}")
        else:
            if line := one_line(text):
                found.setdefault(_number(one.get("image_id")), []).append(line)
            continue
        wrong.append(fault_of(f"annotation {number}", problem))
    return {image: tuple(own) for image, own in found.items()}, wrong


def _document(path: str) -> dict[str, Any]:
    document = load_json(path)
    parts = ("images", "annotations")
    if not isinstance(document, dict) or not all(isinstance(document.get(p), list) for p in parts):
        raise wrong_shape(path, 'a mapping with lists "images" and "annotations" (COCO)', document)
    return document


def _mappings(document: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    every = document.get(name)
    return [one for one in every if isinstance(one, dict)] if isinstance(every, list) else []


def _number(identity: Any) -> int:
    """An image id, which some files hold as text; -1 for what is none."""
    return int(str(identity)) if str(identity).isdecimal() else -1
