"""OK-VQA: questions that need knowledge, in its own two files or in EasyEdit's one.

Its own are OpenEnded_mscoco_val2014_questions.json and mscoco_val2014_annotations.json, as those of
VQAv2; an answer has a `raw_answer` beside the `answer`, whose words were stemmed ("ride" for
"riding"). EasyEdit's okvqa_loc.json is a list of {"question_id", "question", "answer": [ten raw
ones], "image": path}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data_builders.pictures import Pictures
from data_builders.samples import Outcome, Sample
from data_builders.sources import coco
from data_builders.sources.base import Source
from data_builders.sources.checks import fault_of, reference, settled, text_of, texts_of
from data_builders.sources.vqav2 import sample_of
from mmtune.data.options import SourceOptions
from mmtune.data.readers import vqav2
from mmtune.data.readers.json_files import image_root, load_json, wrong_shape
from mmtune.data.records import DataError, Problem, Question

WITHOUT = "question without answers"


@dataclass(frozen=True)
class OkVqaOptions:
    """Questions about COCO images that need knowledge.

    Attributes:
        path: the questions file, or okvqa_loc.json of EasyEdit.
        answers: the annotations file that belongs to the questions; EasyEdit's file has its own.
        images: folder of the images, or of folders named like val2014; None means the file's.
        words: "raw" takes answers as annotators wrote them, "stemmed" as the official scores do.
        captions, instances: files of COCO, see `VQAv2Options`.
        licence: of the images, for the data card.
    """

    path: str
    answers: str | None = None
    images: str | None = None
    words: Literal["raw", "stemmed"] = "raw"
    captions: str | None = None
    instances: str | None = None
    licence: str = ""


class OkVqa(Source[OkVqaOptions]):
    """One sample a question; of the official files its kind is the category of knowledge."""

    name = "okvqa"
    options = OkVqaOptions

    def roots(self) -> Mapping[str, Path]:
        return {self.root: Path(image_root(self.settings.images, self.settings.path))}

    def files(self) -> list[str]:
        own = self.settings
        return [path for path in (own.path, own.answers, own.captions, own.instances) if path]

    def read(self, pictures: Pictures) -> Iterator[Outcome]:
        return settled(self._every(), pictures, self.settings.path)

    def _every(self) -> Iterator[Outcome]:
        document = load_json(self.settings.path)
        if isinstance(document, list):
            for number, item in enumerate(document):
                yield self._listed(item, number)
        elif isinstance(document, dict):
            yield from self._official()
        else:
            raise wrong_shape(self.settings.path, "OK-VQA's questions or EasyEdit's list", document)

    def _official(self) -> Iterator[Outcome]:
        own = self.settings
        if own.answers is None:
            text = "set `answers` to mscoco_val2014_annotations.json or its like"
            raise DataError([Problem(own.path, WITHOUT, text)])
        given = _annotations(own.answers)
        told = {} if own.captions is None else coco.captions(own.captions)
        shown = {} if own.instances is None else coco.categories(own.instances)
        source = SourceOptions("vqav2", path=own.path, images=own.images)
        # "test" questions come without answers, which are joined here because of raw_answer.
        for number, found in enumerate(vqav2.read(source, "test")):
            if isinstance(found, Problem):
                yield fault_of(f"record {number}", found)
                continue
            answered = self._answered(found, given.get(found.id))
            if isinstance(answered, Problem):
                yield fault_of(found.id, answered)
            else:
                yield sample_of(answered, self.root, told, shown, own.licence)

    def _answered(
        self, found: Question, annotation: Mapping[str, Any] | None
    ) -> Question | Problem:
        if annotation is None:
            return Problem(
                found.where, WITHOUT, f"{self.settings.answers} holds none of {found.id}"
            )
        every = annotation.get("answers")
        names = ("raw_answer", "answer") if self.settings.words == "raw" else ("answer",)
        texts = texts_of([_first(one, names) for one in every] if isinstance(every, list) else None)
        if texts is None:
            text = f"answers of {found.id} in {self.settings.answers} are {every!r:.60}"
            return Problem(found.where, "malformed record", text)
        if not texts:
            return Problem(found.where, WITHOUT, f"those of {found.id} are blank")
        kind = annotation.get("question_type")
        fields = dict(found.fields) | ({"question_type": kind} if kind else {})
        return replace(found, answers=texts, fields=fields)

    def _listed(self, item: Any, number: int) -> Outcome:
        where = f"{self.settings.path}, record {number}"
        if not isinstance(item, dict):
            text = f"expected a mapping, got {item!r:.60}"
            return fault_of(f"record {number}", Problem(where, "malformed record", text))
        identity = str(item.get("question_id", f"record {number}"))
        question, image = text_of(item, "question", where), item.get("image")
        answers = texts_of(item.get("answer"))
        if isinstance(question, Problem):
            return fault_of(identity, question)
        if not isinstance(image, str) or answers is None:
            text = f"image is {image!r:.60} and answer {item.get('answer')!r:.60}"
            return fault_of(identity, Problem(where, "malformed record", text))
        if not answers:
            return fault_of(identity, Problem(where, WITHOUT))
        return Sample(
            id=identity,
            question=question,
            image=reference(self.root, image),
            answers=answers,
            licence=self.settings.licence,
            fields={"question_id": item.get("question_id")},
        )


def _annotations(path: str) -> dict[str, dict[str, Any]]:
    document = load_json(path)
    every = document.get("annotations") if isinstance(document, dict) else None
    if not isinstance(every, list):
        raise wrong_shape(path, 'a mapping with a list "annotations" (OK-VQA)', document)
    return {str(one.get("question_id")): one for one in every if isinstance(one, dict)}


def _first(item: Any, names: tuple[str, ...]) -> Any:
    """The first of these fields that an answer has; an answer may be a bare text."""
    if not isinstance(item, dict):
        return item
    return next((item[name] for name in names if name in item), None)
