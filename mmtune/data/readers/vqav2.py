"""VQAv2: `path` is the questions file, `answers` the annotations file, joined on question_id.

{"data_subtype", "questions": [{"question_id", "image_id", "question"}]} and
{"annotations": [{"question_id", "answers": [{"answer"}], "answer_type", "question_type"}]}. The
images are those of COCO, by its names, in `images` or in a folder of their split below it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmtune.data.options import SourceOptions
from mmtune.data.readers.json_files import image_root, load_json, wrong_shape
from mmtune.data.records import DataError, ImageFile, Problem, Question, answers_of

SUBSET = re.compile(r"(train|val|test)(-dev)?(20\d\d)")
KEPT = ("answer_type", "question_type", "multiple_choice_answer")


def read(source: SourceOptions, role: str) -> Iterator[Question | Problem]:
    """Yield the questions; without an annotations file they have no answers (test only).

    Raises:
        DataError: files of another shape; or no annotations file for train or val.
    """
    path = str(source.path)
    document = load_json(path)
    if not isinstance(document, dict) or not isinstance(document.get("questions"), list):
        raise wrong_shape(path, 'a mapping with a list "questions" (VQAv2)', document)
    if source.answers is None and role != "test":
        text = "set `answers` to the annotations file that belongs to the questions"
        raise DataError([Problem(f"data.{role}", "no answers", text)])
    annotations = None if source.answers is None else _annotations(source.answers)
    folder = _folder(source, document, path)
    for number, item in enumerate(document["questions"]):
        yield _question(item, annotations, folder, (f"{path}, record {number}", source.answers))


def _annotations(path: str) -> dict[Any, Any]:
    document = load_json(path)
    found = document.get("annotations") if isinstance(document, dict) else None
    if not isinstance(found, list):
        raise wrong_shape(path, 'a mapping with a list "annotations" (VQAv2)', document)
    return {a.get("question_id"): a for a in found if isinstance(a, dict)}


def _folder(source: SourceOptions, document: Mapping[str, Any], path: str) -> tuple[str, str, str]:
    """(root, folder below it, subset) of the images: v2_..._test-dev2015_... has those of test2015.

    Raises:
        DataError: neither the document nor the name of the file says which images they are.
    """
    match = SUBSET.search(str(document.get("data_subtype"))) or SUBSET.search(Path(path).name)
    if match is None:
        text = 'expected "data_subtype", such as "val2014", there or in the name of the file'
        raise DataError([Problem(path, "not the format it says", text)])
    root, subset = image_root(source.images, path), match[1] + match[3]
    return root, f"{subset}/" if (Path(root) / subset).is_dir() else "", subset


def _question(
    item: Any,
    annotations: Mapping[Any, Any] | None,
    images: tuple[str, str, str],
    files: tuple[str, str | None],
) -> Question | Problem:
    where, answer_file = files
    if not isinstance(item, dict):
        return Problem(where, "malformed record", f"expected a mapping, got {item!r:.60}")
    identity, image, text = (item.get(k) for k in ("question_id", "image_id", "question"))
    if not isinstance(identity, int | str):
        return Problem(where, "malformed record", f"question_id is {identity!r:.60}")
    if not str(image).isdecimal():
        return Problem(where, "malformed record", f"image_id is {image!r:.60}, expected a number")
    if not isinstance(text, str) or not text.strip():
        return Problem(where, "malformed record", f"question is {text!r:.60}, expected text")
    root, folder, subset = images
    file = ImageFile(root, f"{folder}COCO_{subset}_{int(str(image)):012d}.jpg")
    fields, answers = {"image_id": image}, ()
    if annotations is not None:
        found = annotations.get(identity)
        if found is None:
            missing = f"{answer_file} holds nothing for question_id {identity}"
            return Problem(where, "question without answers", missing)
        given = found.get("answers")
        if isinstance(given, list):
            given = [a.get("answer") if isinstance(a, dict) else a for a in given]
        answers = answers_of(given, f"{answer_file}, question_id {identity}", "answers")
        if isinstance(answers, Problem):
            return answers
        fields |= {k: found[k] for k in KEPT if k in found}
    return Question(file, text.strip(), answers, str(identity), where, fields)
