"""Every record is verified before training starts."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from mmtune.data.images import load_image
from mmtune.data.options import DataOptions, OnError
from mmtune.data.readers import read, source_files
from mmtune.data.records import LISTED, DataError, ImageProblem, Problem, Record, counted

log = logging.getLogger(__name__)
ADVICE = "Mend them, or set data.on_error: skip to leave bad records (not whole files) out."


@dataclass(frozen=True)
class Checked:
    """Records that can be used, and what was left out.

    Attributes:
        records: in the order of the source.
        skipped: number of records left out, by reason.
        files: the files that were read (not the images), for the run's manifest.
    """

    records: list[Record]
    skipped: dict[str, int] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)


def check(
    items: Iterable[Record | Problem],
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
    return _settle({name: (records, problems)}, on_error)[name]


def load_data(options: DataOptions, progress: bool = True) -> dict[str, Checked]:
    """Read and check every source of a run; problems of all of them are raised together.

    Returns:
        role (train, val, test) -> its records, for the roles that are set.
    """
    sources = {r: getattr(options, r) for r in ("train", "val", "test") if getattr(options, r)}
    found: dict[str, tuple[list[Record], list[Problem]]] = {}
    for role, source in sources.items():
        try:
            found[role] = verify(read(source, role), progress, role)
        except DataError as error:
            found[role] = ([], error.problems)
            if options.on_error == "skip":
                raise
    checked = _settle(found, options.on_error)
    return {
        role: Checked(c.records, c.skipped, source_files(sources[role], role))
        for role, c in checked.items()
    }


def verify(
    items: Iterable[Record | Problem], progress: bool = True, name: str = ""
) -> tuple[list[Record], list[Problem]]:
    """(records whose image decodes, problems), both in the order of the source."""
    from tqdm.auto import tqdm

    every = list(items)
    label = f"checking {name}".strip()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        verdicts = list(
            tqdm(pool.map(_verdict, every), label, len(every), unit="image", disable=not progress)
        )
    good = [r for r in verdicts if isinstance(r, Record)]
    return good, [p for p in verdicts if isinstance(p, Problem)]


def _verdict(item: Record | Problem) -> Record | Problem:
    if isinstance(item, Problem):
        return item
    if not item.captions:
        return Problem(item.where, "record without caption")
    try:
        load_image(item.image)
    except ImageProblem as error:
        return Problem(item.where, error.reason, error.text)
    return item


def _settle(
    found: Mapping[str, tuple[Sequence[Record], Sequence[Problem]]], on_error: OnError
) -> dict[str, Checked]:
    """Raise all problems at once, or log and count those that are skipped."""
    problems = [p for _, own in found.values() for p in own]
    if problems and on_error == "raise":
        raise DataError(problems, ADVICE)
    for name, (records, own) in found.items():
        if own:
            log.warning(
                "%s: left out %d of %d records (%s): %s%s",
                name or "data",
                len(own),
                len(own) + len(records),
                counted(own),
                "; ".join(str(p) for p in own[:LISTED]),
                "; ..." if len(own) > LISTED else "",
            )
        if not records:
            reason = "all were left out" if own else "the source is empty"
            raise DataError([*own, Problem(name or "data", "no usable record", reason)])
    return {
        name: Checked(list(records), dict(Counter(p.reason for p in own)))
        for name, (records, own) in found.items()
    }
