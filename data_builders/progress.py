"""The shards of one step: which there are, which are still to be made, and by whom."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_builders.engines.base import Engine, Failure, Job
from data_builders.shards import Shard, Task, digest_of, finished, rank, shard_file, world
from data_builders.steps import Step
from mmtune.runs import RunError

FULL = (errno.ENOSPC, errno.EDQUOT)
POLL = 0.5  # seconds between two looks at what other processes have written


class StepError(RunError):
    """A step that cannot go on; what is finished of it is kept."""


@dataclass
class Progress:
    """Tasks of a stage, and the shards that came of them.

    Attributes:
        tasks: in order.
        key: of the stage.
        folder: where its shards are.
        limit: kept samples that are enough; None needs every task.
        strict: a shard with faults is not taken as made.
    """

    tasks: Sequence[Task]
    key: str
    folder: Path
    limit: int | None = None
    strict: bool = False
    made: dict[int, Shard] = field(default_factory=dict)
    samples: int = 0  # in the shards that are made
    first: int = 0  # tasks before it are made
    kept: int = 0  # samples kept by those

    def add(self, shard: Shard) -> None:
        """Note a shard that is on disk."""
        self.made[shard.index] = shard
        self.samples += shard.samples
        while not self.complete and self.first in self.made:
            self.kept += self.made[self.first].kept
            self.first += 1

    @property
    def complete(self) -> bool:
        """Whether no other shard is needed: the first ones keep enough, or all are made."""
        enough = self.limit is not None and self.kept >= self.limit
        return enough or self.first == len(self.tasks)

    def look(self, task: Task) -> bool:
        """Whether the shard of a task is made; if it is on disk, it is noted."""
        if task.index in self.made:
            return True
        if not shard_file(self.folder, task.index).exists():
            return False
        given = digest_of(task.load())
        found = finished(self.folder, task.index, self.key, given)
        if found is None or (self.strict and found.faults):
            return False
        self.add(found)
        return True

    def resume(self) -> None:
        """Note all that is on disk, as far as it is needed."""
        for task in self.tasks:
            if self.complete:
                return
            self.look(task)

    def todo(self) -> Iterator[Task]:
        """Tasks of this process that are not made, as long as they are needed."""
        for task in self.tasks[rank() :: world()]:
            # What others have made since may be enough.
            while not self.complete and self.look(self.tasks[self.first]):
                pass
            if self.complete:
                return
            if not self.look(task):
                yield task

    def shards(self) -> list[Shard]:
        """Those that count, in order."""
        return [self.made[index] for index in range(self.first)]


def run_shards(job: Job, progress: Progress, engine: Engine, step: Step) -> list[Shard]:
    """Make the shards of a stage that are missing, together with other processes of a launch.

    Args:
        job: the stage.
        progress: over its tasks.
        engine: where they run.
        step: for messages.

    Returns:
        the shards in order, up to the one with which enough samples are kept.

    Raises:
        StepError: a shard that cannot be made; a fault where faults end the build.
    """
    progress.resume()
    unit = "sample" if progress.limit is None else "kept"
    with bar_of(step.name, _total(progress), unit, _at(progress)) as bar:
        with closing(engine.run(job, progress.todo())) as results:  # type: ignore[type-var]
            for result in results:
                if isinstance(result, Failure):
                    raise _error(result, step, progress)
                progress.add(result)
                bar.update(_at(progress) - bar.n)
                if progress.complete:
                    break
        while not progress.complete and world() > 1:
            time.sleep(POLL)
            for task in progress.tasks[progress.first :]:
                progress.look(task)
            bar.update(_at(progress) - bar.n)
    if not progress.complete:
        raise StepError(f"{step.name}: the engine gave up before all shards were made.")
    return progress.shards()


def bar_of(name: str, total: int | None, unit: str, initial: int = 0) -> Any:
    """A progress bar on the error stream, of the first process alone."""
    from tqdm.auto import tqdm

    hidden = True if rank() else None  # None: where nobody looks
    return tqdm(desc=name, total=total, unit=unit, initial=initial, disable=hidden)


def counted(reasons: Iterable[tuple[str, int]]) -> str:
    """Counts by reason for a message, the most frequent first."""
    ordered = sorted(reasons, key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{count:,} {reason}" for reason, count in ordered)


def at_fault(by: str, fault: str) -> str:
    """What to say where a fault ends the build."""
    return (
        f"{by}: {fault}. Mend it, or set on_fault: skip to set such samples aside and count them."
    )


def full_disk(folder: Path) -> str:
    """What to say where a disk is full."""
    free = shutil.disk_usage(folder).free
    return (
        f"the disk of {folder} is full ({free / 2**20:,.0f} MiB free). What is finished is kept: "
        "make room, and the same command goes on."
    )


def _total(progress: Progress) -> int:
    every = sum(task.samples for task in progress.tasks)
    return every if progress.limit is None else min(every, progress.limit)


def _at(progress: Progress) -> int:
    if progress.limit is not None:
        return min(progress.kept, _total(progress))
    return progress.samples


def _error(failure: Failure, step: Step, progress: Progress) -> Exception:
    by = f"{step.name} ({step.choice.by})" if step.choice.by else step.name
    kept = f"{len(progress.made):,} of its {len(progress.tasks):,} shards are finished and kept"
    again = f"{kept}; the same command goes on with the others."
    if failure.errno in FULL:
        return StepError(f"{by}: {full_disk(step.folder)}")
    if failure.kind == "opening":
        text = f"{by} cannot start: {failure.text}"
    elif failure.kind == "fault":
        text = f"{at_fault(by, failure.text)} {again}"
    else:
        text = f"{by} failed in {_where(failure, progress)}: {failure.text}. {again}"
    error = StepError(text)
    if failure.trace:
        error.__cause__ = RuntimeError(failure.trace)
    return error


def _where(failure: Failure, progress: Progress) -> str:
    if failure.index is None:
        left = [str(t.index) for t in progress.tasks if t.index not in progress.made]
        more = "…" if len(left) > 8 else ""
        return f"one of the shards that are left ({', '.join(left[:8])}{more})"
    samples = progress.tasks[failure.index].load()
    return f"shard {failure.index} (samples {samples[0].id} to {samples[-1].id})"
