"""A folder of images with metadata.jsonl, the layout that `datasets` calls imagefolder.

A line is {"file_name": path below the folder, "question", "answer" | "answers", "caption" |
"captions", "concept", "license", "id", "rephrase", "kind"}; all but file_name may be missing where
what is left makes a sample. Without file_name it is a question about no image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_builders.pictures import Pictures
from data_builders.samples import Outcome, Sample
from data_builders.sources.base import Source
from data_builders.sources.checks import fault_of, one_line, reference, settled, texts_of
from data_builders.sources.coco import PROMPT
from mmtune.data.readers.columns import CAPTIONS
from mmtune.data.readers.json_files import json_lines
from mmtune.data.records import Problem

METADATA = "metadata.jsonl"
ANSWERS = ("answers", "answer")
LICENCES = ("license", "licence")
OWN = ("question", "concept", "rephrase", "kind", "split")  # one text each


@dataclass(frozen=True)
class FolderOptions:
    """One's own images.

    Attributes:
        path: the folder that holds metadata.jsonl, or that file.
        images: folder that file names are relative to; None means the file's.
        prompt: what the model is asked about images with captions and no question.
        licence: of images whose line states none, for the data card.
    """

    path: str
    images: str | None = None
    prompt: str = PROMPT
    licence: str = ""


class Folder(Source[FolderOptions]):
    """One sample a line, whose id is its `id`, or its file name and number."""

    name = "folder"
    options = FolderOptions

    def roots(self) -> Mapping[str, Path]:
        return {self.root: Path(self.settings.images or self._metadata().parent)}

    def files(self) -> list[str]:
        return [str(self._metadata())]

    def read(self, pictures: Pictures) -> Iterator[Outcome]:
        return settled(self._every(), pictures, str(self._metadata()))

    def _metadata(self) -> Path:
        path = Path(self.settings.path)
        return path / METADATA if path.is_dir() or not path.suffix else path

    def _every(self) -> Iterator[Outcome]:
        for number, (where, item) in enumerate(json_lines(str(self._metadata()))):
            identity = f"record {number}"
            if isinstance(item, dict):
                identity = str(item.get("id", f"{item.get('file_name', '')}#{number}"))
                item = self._sample(item, identity, where)
            elif not isinstance(item, Problem):
                text = f"expected a mapping, got {item!r:.60}"
                item = Problem(where, "malformed record", text)
            yield fault_of(identity, item) if isinstance(item, Problem) else item

    def _sample(self, item: Mapping[str, Any], identity: str, where: str) -> Sample | Problem:
        texts = {name: item.get(name) or "" for name in (*OWN, "file_name")}
        every = {"captions": _field(item, CAPTIONS, ()), "answers": _field(item, ANSWERS, ())}
        wrong = [n for n, value in texts.items() if not isinstance(value, str)]
        wrong += [n for n, value in every.items() if value is None]
        if wrong:
            text = f"{wrong[0]} is {item.get(wrong[0])!r:.60}, expected text"
            return Problem(where, "malformed record", text)
        captions, answers = every["captions"] or (), every["answers"] or ()
        question = one_line(texts["question"])
        if not question:
            if not captions:
                text = "it needs a question with an answer, or a caption"
                return Problem(where, "neither question nor caption", text)
            question, answers = self.settings.prompt, captions
        if not answers:
            return Problem(where, "question without answers")
        return Sample(
            id=identity,
            question=question,
            image=reference(self.root, texts["file_name"]) if texts["file_name"] else "",
            answers=answers,
            captions=captions,
            concept=one_line(texts["concept"]),
            split=texts["split"],
            licence=str(next((item[k] for k in LICENCES if item.get(k)), self.settings.licence)),
            fields={name: one_line(texts[name]) for name in ("rephrase", "kind") if texts[name]},
        )


def _field(item: Mapping[str, Any], names: tuple[str, ...], missing: Any) -> Any:
    """Texts under the first of the names that is there; None where they are no texts."""
    found = next((item[name] for name in names if item.get(name) is not None), None)
    return missing if found is None else texts_of(found)
