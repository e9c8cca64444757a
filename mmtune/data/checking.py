"""Every record is verified before training starts."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from mmtune.data.images import load_image
from mmtune.data.options import DataOptions, OnError
from mmtune.data.readers import read, source_files
from mmtune.data.records import (
    DataError,
    ImageProblem,
    MediaRef,
    Problem,
    Question,
    Record,
    VideoFile,
    counted,
    listed,
)

log = logging.getLogger(__name__)
Item = Record | Question
GIVES = {Record: "captions", Question: "questions"}
ADVICE = "Mend them, or set data.on_error: skip to leave bad records (not whole files) out."


@dataclass(frozen=True)
class Checked:
    """Records that can be used, and what was left out.

    Attributes:
        records: captioned images, or questions, in the order of the source.
        skipped: number of records left out, by reason.
        files: the files that were read (not the images), for the run's manifest.
    """

    records: list[Any]
    skipped: dict[str, int] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)


def check(
    items: Iterable[Item | Problem],
    on_error: OnError = "raise",
    progress: bool = True,
    name: str = "",
) -> Checked:
    """Decode every image once and count what is wrong.

    Args:
        items: what a reader yields.
        on_error: "raise" or "skip", see `DataOptions`.
        progress: draw a progress bar.
        name: names the source in the progress bar and the log.

    Raises:
        DataError: on_error is "raise" and there is a problem; or no record is left.
    """
    records, problems = verify(items, progress, name)
    return settle({name: (records, problems)}, on_error)[name]


def load_data(
    options: DataOptions, progress: bool = True, kind: type[Item] = Record, videos: bool = False
) -> dict[str, Checked]:
    """Read and check every source of a run; problems of all of them are raised together.

    Args:
        options: the sources.
        progress: draw a progress bar.
        kind: what the task needs, `Record` or `Question`.
        videos: whether they may be about videos.

    Returns:
        role (train, val, test) -> its records, for the roles that are set.

    Raises:
        DataError: bad records with on_error: raise, no usable record, or a source of another kind
            than the task needs.
    """
    sources = {r: getattr(options, r) for r in ("train", "val", "test") if getattr(options, r)}
    found: dict[str, tuple[list[Item], list[Problem]]] = {}
    for role, source in sources.items():
        try:
            every = list(read(source, role))
            _require_kind(every, kind, videos, f"data.{role} ({source.format})")
            found[role] = verify(every, progress, role)
        except DataError as error:
            found[role] = ([], error.problems)
            if options.on_error == "skip":
                raise
    checked = settle(found, options.on_error)
    return {
        role: Checked(c.records, c.skipped, source_files(sources[role], role))
        for role, c in checked.items()
    }


def _require_kind(
    items: Iterable[Item | Problem], kind: type[Item], videos: bool, where: str
) -> None:
    for item in items:
        if isinstance(item, Problem):
            continue
        wrong = None
        if not isinstance(item, kind):
            wrong = (
                f"it gives {GIVES[type(item)]}, the task needs {GIVES[kind]}: set another format"
            )
        elif isinstance(item.image, VideoFile) and not videos:
            wrong = "it gives videos, the task needs images: set task.name to one for videos"
        if wrong:
            raise DataError([Problem(where, "not what the task needs", wrong)])


def verify(
    items: Iterable[Item | Problem], progress: bool = True, name: str = ""
) -> tuple[list[Item], list[Problem]]:
    """(records whose image or video decodes, problems), both in the order of the source.

    What several records share is decoded once.
    """
    every = list(items)
    wrong = faults((i.image for i in every if not isinstance(i, Problem)), progress, name)
    verdicts = [_verdict(item, wrong) for item in every]
    good = [r for r in verdicts if not isinstance(r, Problem)]
    return good, [p for p in verdicts if isinstance(p, Problem)]


def faults(
    media: Iterable[MediaRef], progress: bool = True, name: str = ""
) -> dict[Any, ImageProblem | None]:
    """What is wrong with each image or video, None where nothing is; each is decoded once.

    The keys are the references themselves, but for those into a `datasets.Dataset`.
    """
    from tqdm.auto import tqdm

    label = f"checking {name}".strip()
    once = {_key(ref): ref for ref in media}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(_fault, once.values())
        shown = tqdm(found, label, len(once), unit="image", disable=not progress)
        return dict(zip(once, shown, strict=True))


def _key(ref: MediaRef) -> Any:
    """What is the same for the same image; a dataset's cell compares without its dataset."""
    dataset = getattr(ref, "dataset", None)
    return ref if dataset is None else (id(dataset), ref)


def _fault(ref: MediaRef) -> ImageProblem | None:
    """What is wrong with an image or video, if anything is."""
    try:
        if isinstance(ref, VideoFile):
            from mmtune.data.video import check_video

            check_video(ref)
        else:
            load_image(ref)
    except ImageProblem as error:
        return error
    return None


def _verdict(item: Item | Problem, faults: Mapping[Any, ImageProblem | None]) -> Item | Problem:
    if isinstance(item, Problem):
        return item
    if isinstance(item, Record) and not item.captions:
        return Problem(item.where, "record without caption")
    fault = faults[_key(item.image)]
    return item if fault is None else Problem(item.where, fault.reason, fault.text)


def settle(
    found: Mapping[str, tuple[Sequence[Any], Sequence[Problem]]],
    on_error: OnError,
    advice: str = ADVICE,
) -> dict[str, Checked]:
    """Raise all problems at once, or log and count those that are skipped.

    Args:
        found: name of a source -> its good records, and what is wrong with the others.
        on_error: "raise" or "skip".
        advice: ends the message of the error.

    Raises:
        DataError: on_error is "raise" and there is a problem; or a source has no record left.
    """
    problems = [p for _, own in found.values() for p in own]
    if problems and on_error == "raise":
        raise DataError(problems, advice)
    for name, (records, own) in found.items():
        if own:
            log.warning(
                "%s: left out %d of %d records (%s): %s",
                name or "data",
                len(own),
                len(own) + len(records),
                counted(own),
                listed(own),
            )
        if not records:
            reason = "all were left out" if own else "the source is empty"
            raise DataError([*own, Problem(name or "data", "no usable record", reason)])
    return {
        name: Checked(list(records), dict(Counter(p.reason for p in own)))
        for name, (records, own) in found.items()
    }
