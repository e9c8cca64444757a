"""VQAv2: a questions and an annotations file, read as `mmtune train` reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_builders.pictures import Pictures
from data_builders.samples import Outcome, Sample
from data_builders.sources import coco
from data_builders.sources.base import Source
from data_builders.sources.checks import fault_of, one_line, reference, settled
from mmtune.data.options import SourceOptions
from mmtune.data.readers import vqav2
from mmtune.data.readers.json_files import image_root
from mmtune.data.records import ImageFile, Problem, Question


@dataclass(frozen=True)
class VQAv2Options:
    """Questions about COCO images, with ten answers each.

    Attributes:
        path: v2_OpenEnded_mscoco_val2014_questions.json or another of its kind.
        answers: the annotations file that belongs to it, v2_mscoco_val2014_annotations.json.
        images: folder of the images, or of folders named like val2014; None means the file's.
        captions: captions_val2014.json of COCO: what the images show, in sentences, from which
            generality images are drawn. None leaves samples without.
        instances: instances_val2014.json of COCO: the largest thing on an image is its concept.
        licence: of the images, for the data card.
    """

    path: str
    answers: str
    images: str | None = None
    captions: str | None = None
    instances: str | None = None
    licence: str = ""


class VQAv2(Source[VQAv2Options]):
    """One sample a question; its kind is the question's type, such as "what color is the"."""

    name = "vqav2"
    options = VQAv2Options
    licence = "CC BY 4.0 (VQA v2)"

    def roots(self) -> Mapping[str, Path]:
        return {self.root: Path(image_root(self.settings.images, self.settings.path))}

    def files(self) -> list[str]:
        own = self.settings
        return [path for path in (own.path, own.answers, own.captions, own.instances) if path]

    def read(self, pictures: Pictures) -> Iterator[Outcome]:
        return settled(self._every(), pictures, self.settings.path)

    def _every(self) -> Iterator[Outcome]:
        own = self.settings
        told = {} if own.captions is None else coco.captions(own.captions)
        shown = {} if own.instances is None else coco.categories(own.instances)
        source = SourceOptions("vqav2", path=own.path, images=own.images, answers=own.answers)
        for number, found in enumerate(vqav2.read(source, "train")):
            if isinstance(found, Problem):
                yield fault_of(f"record {number}", found)
            else:
                yield sample_of(found, self.root, told, shown, own.licence)


def sample_of(
    found: Question,
    root: str,
    told: Mapping[int, tuple[str, ...]],
    shown: Mapping[int, list[str]],
    licence: str,
) -> Sample:
    """The sample of a question about a COCO image.

    Args:
        found: the question.
        root: of its image.
        told: image id -> its captions.
        shown: image id -> what is on it, the largest first.
        licence: of its image.
    """
    assert isinstance(found.image, ImageFile)
    image = int(str(found.fields["image_id"]))
    kind = found.fields.get("question_type")
    return Sample(
        id=found.id,
        question=one_line(found.question),
        image=reference(root, found.image.name),
        answers=tuple(map(one_line, found.answers)),
        captions=told.get(image, ()),
        concept=next(iter(shown.get(image, ())), ""),
        licence=licence,
        fields={"question_id": found.id, "image_id": image} | ({"kind": kind} if kind else {}),
    )
