"""What every source looks at before a sample goes on: its id, its image file, and blank texts.

Whether an image decodes is found where it is first loaded, by the stage that asks the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data_builders.pictures import SEPARATOR, Pictures
from data_builders.samples import Outcome, Rejected, Sample
from mmtune.data.records import DataError, ImageProblem, Problem

DUPLICATE, NONE = "duplicate id", "no sample"


def settled(every: Iterable[Outcome], pictures: Pictures, where: str) -> Iterator[Outcome]:
    """The same outcomes; a sample without its image file, or whose id was there, is a fault.

    Args:
        every: as they were read.
        pictures: where their images are.
        where: names the file in messages.

    Raises:
        DataError: when all are read and none is a sample.
    """
    known: set[str] = set()
    files: dict[str, ImageProblem | None] = {"": None}  # questions share images
    reasons: Counter[str] = Counter()
    found = 0
    for number, outcome in enumerate(every):
        if isinstance(outcome, Sample):
            outcome = _checked(outcome, number, known, files, pictures, where)
        if isinstance(outcome, Sample):
            known.add(outcome.id)
            found += 1
        else:
            reasons[outcome.reason] += 1
        yield outcome
    if not found:
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise DataError([Problem(where, NONE, why or "it is empty")])


def fault_of(identity: str, problem: Problem) -> Rejected:
    """What is wrong with a record, as an outcome that names its file."""
    text = f"{problem.where}: {problem.text}" if problem.text else problem.where
    return Rejected(identity, problem.reason, text, fault=True)


def reference(root: str, name: str) -> str:
    """The reference of the file `name` below a root of `Pictures`."""
    return f"{root}{SEPARATOR}{name}"


def one_line(text: str) -> str:
    """Without line breaks, and one blank where there were several."""
    return " ".join(text.split())


def text_of(item: Mapping[str, Any], name: str, where: str) -> str | Problem:
    """A text of a record that must be there and not blank, on one line."""
    value = item.get(name)
    if not isinstance(value, str):
        return Problem(where, "malformed record", f"{name} is {value!r:.60}, expected text")
    return one_line(value) or Problem(where, "empty field", f"{name} is {value!r:.60}")


def texts_of(value: Any) -> tuple[str, ...] | None:
    """A text, or a list of texts, as those that are not blank; None for anything else."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(t, str) for t in items):
        return None
    return tuple(line for t in items if (line := one_line(t)))


def _checked(
    sample: Sample,
    number: int,
    known: set[str],
    files: dict[str, ImageProblem | None],
    pictures: Pictures,
    where: str,
) -> Outcome:
    if sample.id in known:
        text = f"{where}: {sample.id!r} names an earlier record too"
        return Rejected(f"{sample.id} (again, number {number})", DUPLICATE, text, fault=True)
    if sample.image not in files:
        files[sample.image] = _problem(sample.image, pictures)
    problem = files[sample.image]
    if problem is None:
        return sample
    text = f"{where}, {sample.id!r}: {problem.text}"
    return Rejected(sample.id, problem.reason, text, fault=True)


def _problem(image: str, pictures: Pictures) -> ImageProblem | None:
    try:
        pictures.file(image).path()
    except ImageProblem as error:
        return error
    return None
