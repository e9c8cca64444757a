"""The files that hold what became of samples: written whole or not at all, and checked when read.

A shard is a file of JSON lines: a header, a line for every outcome, and an end with counts and a
hash, so that no part of a file passes for the whole of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_builders.samples import Outcome, Rejected, Sample
from mmtune.runs import RunError

PARTIAL = ".partial"


@dataclass(frozen=True)
class Shard:
    """What is in a file of outcomes.

    Attributes:
        index: its place in the stage, from 0.
        samples: outcomes in it.
        kept: those that go on.
        rejected, faults: the others, by reason.
        digest: of the outcomes.
    """

    index: int
    samples: int
    kept: int
    rejected: Mapping[str, int]
    faults: Mapping[str, int]
    digest: str


@dataclass(frozen=True)
class Part:
    """The kept samples number `start` to `stop` - 1 of a file."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class Task:
    """The work on one shard: which samples go into it; small, wherever it is sent."""

    index: int
    parts: tuple[Part, ...]

    @property
    def samples(self) -> int:
        """How many."""
        return sum(part.stop - part.start for part in self.parts)

    def load(self) -> list[Sample]:
        """Read them."""
        return [s for part in self.parts for s in kept_in(Path(part.file))[part.start : part.stop]]

    def as_json(self) -> str:
        """In one line."""
        return json.dumps([self.index, [[p.file, p.start, p.stop] for p in self.parts]])

    @staticmethod
    def of_json(text: str) -> Task:
        """What `as_json` gave."""
        index, parts = json.loads(text)
        return Task(index, tuple(Part(*part) for part in parts))


def shard_file(folder: Path, index: int) -> Path:
    """Where a shard is."""
    return folder / f"shard-{index:05d}.jsonl"


def cut(parts: Iterable[Part], size: int) -> list[Task]:
    """Tasks of `size` samples each, in the order of the parts; the last may be smaller."""
    tasks: list[Task] = []
    own: list[Part] = []
    room = size
    for part in parts:
        start = part.start
        while start < part.stop:
            stop = min(part.stop, start + room)
            own.append(Part(part.file, start, stop))
            room -= stop - start
            start = stop
            if not room:
                tasks.append(Task(len(tasks), tuple(own)))
                own, room = [], size
    return [*tasks, Task(len(tasks), tuple(own))] if own else tasks


def write_shard(
    folder: Path, index: int, stage: str, key: str, given: str, outcomes: Sequence[Outcome]
) -> Shard:
    """Write outcomes under a temporary name, then rename it.

    Args:
        folder: of the stage.
        index: of the shard.
        stage: its name, for people who read the file.
        key: of the stage, see `data_builders.manifests`.
        given: digest of the samples that went in.
        outcomes: in order.

    Raises:
        OSError: such as on a full disk; nothing is left behind.
    """
    lines = [_line(outcome) for outcome in outcomes]
    shard = _counted(index, outcomes, lines)
    head = {"stage": stage, "shard": index, "key": key, "input": given}
    end = dataclasses.asdict(shard)
    text = "\n".join([json.dumps(head), *lines, json.dumps({"end": end}), ""])
    path = shard_file(folder, index)
    partial = path.with_name(f"{path.name}.{rank()}-{os.getpid()}{PARTIAL}")
    try:
        with partial.open("w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return shard


def read_outcomes(path: Path) -> list[Outcome]:
    """What became of each sample of a shard.

    Raises:
        RunError: the file is missing or damaged.
    """
    found = _checked(path)
    if found is None:
        raise RunError(
            f"{path} is missing or damaged, though it was finished. Remove it if it is there; "
            "the same command makes it again."
        )
    return [_outcome(json.loads(line)) for line in found[2]]


def kept_in(path: Path) -> list[Sample]:
    """The samples of a shard that go on. Raises RunError as `read_outcomes` does."""
    return [outcome for outcome in read_outcomes(path) if isinstance(outcome, Sample)]


def finished(folder: Path, index: int, key: str, given: str) -> Shard | None:
    """A shard that is there, whole, and made by this stage from these samples; else None."""
    found = _checked(shard_file(folder, index))
    if found is None or (found[0]["key"], found[0]["input"]) != (key, given):
        return None
    return Shard(**found[1])


def digest_of(samples: Iterable[Sample]) -> str:
    """Names samples by their content."""
    return _digest(_line(sample) for sample in samples)


def sweep(folder: Path) -> None:
    """Remove what a killed process left half written, in a folder and those below it."""
    for path in folder.rglob(f"*{PARTIAL}"):
        path.unlink(missing_ok=True)


def rank() -> int:
    """The number of this process in a launch of several (torchrun), 0 otherwise."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes were launched together, such as by torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _counted(index: int, outcomes: Sequence[Outcome], lines: Iterable[str]) -> Shard:
    away = [outcome for outcome in outcomes if isinstance(outcome, Rejected)]
    return Shard(
        index=index,
        samples=len(outcomes),
        kept=len(outcomes) - len(away),
        rejected=dict(Counter(one.reason for one in away if not one.fault)),
        faults=dict(Counter(one.reason for one in away if one.fault)),
        digest=_digest(lines),
    )


def _checked(path: Path) -> tuple[dict[str, Any], dict[str, Any], list[str]] | None:
    """(header, end, lines of outcomes) of a whole file; None for anything else."""
    try:
        head, *lines, last, after = path.read_text(encoding="ascii").split("\n")
        start, end = json.loads(head), json.loads(last)["end"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    whole = after == "" and end["samples"] == len(lines) and end["digest"] == _digest(lines)
    return (start, end, lines) if whole else None


def _line(outcome: Outcome) -> str:
    # Escapes keep every string that JSON can hold, and a line one line.
    if isinstance(outcome, Sample):
        return json.dumps({"sample": outcome.as_json()})
    return json.dumps({"rejected": dataclasses.asdict(outcome)})


def _outcome(raw: Mapping[str, Any]) -> Outcome:
    return Sample.of_json(raw["sample"]) if "sample" in raw else Rejected(**raw["rejected"])


def _digest(lines: Iterable[str]) -> str:
    found = hashlib.sha256()
    for line in lines:
        found.update(line.encode() + b"\n")
    return found.hexdigest()[:32]


def outcomes_until(shards: Iterator[list[Outcome]], limit: int | None) -> Iterator[list[Outcome]]:
    """Outcomes of shard after shard, up to the one that is the last of `limit` kept samples."""
    left = limit
    for outcomes in shards:
        if left is None:
            yield outcomes
            continue
        at = [n for n, one in enumerate(outcomes, 1) if isinstance(one, Sample)]
        if len(at) >= left:
            yield outcomes[: at[left - 1]]
            return
        left -= len(at)
        yield outcomes
