"""Natural Questions: questions about no image, as MEND prepares them, or line by line.

MEND's train.json and validation.json are {"questions": [text], "answers": [text]}. Lists, or JSON
lines, of {"question", "answer": text or list} are read too: the open-domain release of the authors
has that form (NQ-open.dev.jsonl).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_builders.pictures import Pictures
from data_builders.samples import Outcome, Sample
from data_builders.sources.base import Source
from data_builders.sources.checks import fault_of, settled, text_of, texts_of
from mmtune.data.readers.json_files import json_lines, load_json, wrong_shape
from mmtune.data.records import DataError, Problem

PUBLISHED_PREFIX = "nq question: "  # in front of every `loc` of the published files


@dataclass(frozen=True)
class NqOptions:
    """Questions about no image.

    Attributes:
        path: a .json file, or .jsonl for one question a line.
        prefix: put in front of every question that does not begin with it; the published files
            have "nq question: ".
    """

    path: str
    prefix: str = ""


class NaturalQuestions(Source[NqOptions]):
    """One sample a question, whose id is its `id`, or its number in the file."""

    name = "nq"
    options = NqOptions
    licence = "CC BY-SA 3.0 (Natural Questions)"

    def roots(self) -> Mapping[str, Path]:
        return {}

    def files(self) -> list[str]:
        return [self.settings.path]

    def read(self, pictures: Pictures) -> Iterator[Outcome]:
        return settled(self._every(), pictures, self.settings.path)

    def _every(self) -> Iterator[Outcome]:
        for number, (where, item) in enumerate(_items(self.settings.path)):
            if isinstance(item, Problem):
                yield fault_of(f"record {number}", item)
            else:
                yield self._sample(item, number, where)

    def _sample(self, item: Any, number: int, where: str) -> Outcome:
        if not isinstance(item, dict):
            text = f"expected a mapping, got {item!r:.60}"
            return fault_of(f"record {number}", Problem(where, "malformed record", text))
        identity = str(item.get("id", number))
        question = text_of(item, "question", where)
        if isinstance(question, Problem):
            return fault_of(identity, question)
        given = item.get("answers", item.get("answer"))
        answers = texts_of(given)
        if answers is None:
            text = f"answers are {given!r:.60}, expected a text or a list of texts"
            return fault_of(identity, Problem(where, "malformed record", text))
        if not answers:
            return fault_of(identity, Problem(where, "question without answers"))
        prefix = self.settings.prefix
        whole = question if question.startswith(prefix.strip()) else prefix + question
        return Sample(id=identity, question=whole, answers=answers)


def _items(path: str) -> Iterator[tuple[str, Any]]:
    """(where, {"question", "answers"}), or a Problem in its place."""
    if path.endswith(".jsonl"):
        yield from json_lines(path)
        return
    document = load_json(path)
    if isinstance(document, list):
        yield from ((f"{path}, record {n}", item) for n, item in enumerate(document))
        return
    found = document if isinstance(document, dict) else {}
    questions, answers = found.get("questions"), found.get("answers")
    if not isinstance(questions, list) or not isinstance(answers, list):
        expected = 'a mapping with lists "questions" and "answers" (MEND), or a list of questions'
        raise wrong_shape(path, expected, document)
    if len(questions) != len(answers):
        text = f"{len(questions)} questions and {len(answers)} answers"
        raise DataError([Problem(path, "not the format it says", text)])
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        yield f"{path}, record {number}", {"question": question, "answers": answer}
