"""Processes of this machine: one in place, or several that are started for a stage."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from data_builders.engines.base import (
    Engine,
    Failure,
    Job,
    Result,
    Worker,
    devices,
    set_threads,
)

if TYPE_CHECKING:
    from data_builders.config import EngineOptions
    from data_builders.shards import Task

GRACE = 5.0  # seconds that a process has to end


class LocalEngine(Engine):
    """`workers: 1` works in this process; more are processes of their own, one device each."""

    def __init__(self, options: EngineOptions, device: str) -> None:
        super().__init__(options, device)
        self.team: list[_Process] = []  # stays from stage to stage: starting one takes seconds

    def run(self, job: Job, tasks: Iterator[Task]) -> Iterator[Result]:
        if self.options.workers > 1:
            yield from self._spread(job, tasks)
            return
        before = set_threads(job.threads)
        try:
            worker = None
            for task in tasks:
                worker = worker or Worker(job, devices(self.device)[0])
                yield worker.attempt(task)
        finally:
            if before is not None:
                set_threads(before)

    def close(self) -> None:
        for one in self.team:
            one.end()
        self.team = []

    def _spread(self, job: Job, tasks: Iterator[Task]) -> Iterator[Result]:
        try:
            while True:
                while self._room() and (task := next(tasks, None)) is not None:
                    self._free().give(job, task)
                busy = {one.pipe: one for one in self.team if one.task is not None}
                if not busy:
                    return
                for pipe in wait(list(busy)):
                    yield busy[pipe].take()  # type: ignore[index]
        finally:
            for one in self.team:
                if one.task is not None:
                    one.end()
            self.team = [one for one in self.team if one.process.is_alive()]

    def _room(self) -> bool:
        """Whether one has nothing to do, or may be started."""
        return sum(one.task is not None for one in self.team) < self.options.workers

    def _free(self) -> _Process:
        """One that has nothing to do, started if need be."""
        for one in self.team:
            if one.task is None:
                return one
        places = devices(self.device)
        self.team.append(_Process(places[len(self.team) % len(places)]))
        return self.team[-1]


class _Process:
    """A process that works on one task at a time, and what it works on."""

    def __init__(self, device: str) -> None:
        context = get_context("spawn")  # a fork of a process that has used CUDA cannot use it
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, device), daemon=True)
        self.job: Job | None = None
        self.task: Task | None = None
        self.process.start()
        theirs.close()  # so that its end is seen

    def give(self, job: Job, task: Task) -> None:
        """Send a task, if the process is there; `take` finds out if not."""
        self.task = task
        with suppress(OSError):
            if self.job is not job:
                self.pipe.send(job)
            self.pipe.send(task)
        self.job = job

    def take(self) -> Result:
        """What became of the task; waits for it."""
        assert self.task is not None
        try:
            result = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(GRACE)
            result = Failure(self.task.index, "killed", _ending(self.process.exitcode))
        self.task = None
        return result

    def end(self) -> None:
        """Stop it, at once where it still works."""
        if self.task is None:
            with suppress(OSError):
                self.pipe.send(None)
        else:
            self.process.terminate()
        self.process.join(GRACE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        why = ", as the kernel does where memory runs out" if -code == signal.SIGKILL else ""
        return f"its process was killed by {name}{why}"
    return f"its process ended with exit code {code}"


def _work(pipe: Connection[Any, Any], device: str) -> None:
    """What a process does: task after task, until there is none or the main process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process hears Ctrl-C and ends this one
    os.environ.setdefault("TQDM_DISABLE", "1")
    worker = None
    while True:
        try:
            given = pipe.recv()
            if given is None:
                return
            if isinstance(given, Job):
                worker = None  # its model leaves before another comes
                worker = Worker(given, device)
            elif worker is not None:
                pipe.send(worker.attempt(given))
        except (EOFError, OSError):
            return
