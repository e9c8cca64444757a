"""What an engine does, and the work on one shard, which is the same in all of them."""

from __future__ import annotations

import os
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_builders.samples import Outcome, Rejected
from data_builders.shards import Shard, Task, digest_of, write_shard

if TYPE_CHECKING:
    from data_builders.config import EngineOptions
    from data_builders.stages.base import Context, Stage


@dataclass(frozen=True)
class Job:
    """A stage to be run on shards; it can be pickled.

    Attributes:
        name: of the step, for messages.
        key: of the step, written into every shard.
        stage: the class.
        settings: of the stage.
        context: what the stage is told; each process puts its own device.
        folder: where shards are written.
        stop: a fault ends the build, and its shard is not written.
        threads: of each process on the CPU.
    """

    name: str
    key: str
    stage: type[Stage[Any]]
    settings: Any
    context: Context
    folder: Path
    stop: bool = False
    threads: int = 1


@dataclass(frozen=True)
class Failure:
    """Why a shard was not written.

    Attributes:
        index: of the shard; None where nobody knows which.
        kind: "fault" (a sample, and a fault ends the build), "opening" (the stage cannot start),
            "error" (an exception) or "killed" (the process is gone).
        text: what happened.
        trace: the traceback.
        errno: of an OSError.
    """

    index: int | None
    kind: str
    text: str
    trace: str = ""
    errno: int | None = None


Result = Shard | Failure


class Engine(ABC):
    """Runs a stage on shards, several at a time.

    Attributes:
        options: its section of the config.
        device: "auto", "cpu" or "cuda".
    """

    def __init__(self, options: EngineOptions, device: str) -> None:
        self.options, self.device = options, device

    @abstractmethod
    def run(self, job: Job, tasks: Iterator[Task]) -> Iterator[Result]:
        """Work on tasks, in any order; what is done first is told first.

        Args:
            job: the stage.
            tasks: taken from the iterator when somebody is free, so that it can end early.

        Closing the returned iterator stops the work; what is being done is given up.
        """

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Give back what the engine holds; it may be used again."""


class Worker:
    """A stage in one process: opened once, then given shard after shard."""

    def __init__(self, job: Job, device: str) -> None:
        self.job, self.device = job, device
        self.stage: Stage[Any] | None = None

    def attempt(self, task: Task) -> Result:
        """Make one shard; what goes wrong is told, not raised."""
        try:
            self.stage = self.stage or self._open()
        except Exception as error:
            return _failure(task.index, "opening", error)
        try:
            set_threads(self.job.threads)
            return self._shard(self.stage, task)
        except Exception as error:
            return _failure(task.index, "error", error)

    def _open(self) -> Stage[Any]:
        if self.device.startswith("cuda:"):
            import torch

            torch.cuda.set_device(self.device)  # whoever says "cuda" means this one
        set_threads(self.job.threads)
        stage = self.job.stage(self.job.settings, replace(self.job.context, device=self.device))
        stage.open()
        return stage

    def _shard(self, stage: Stage[Any], task: Task) -> Result:
        samples = task.load()
        outcomes = stage.run(samples)
        if [one.id for one in outcomes] != [one.id for one in samples]:
            raise RuntimeError(
                f"{type(stage).__name__}.run gave {len(outcomes)} outcomes for "
                f"{len(samples)} samples, or other ids; expected one each, in the same order"
            )
        fault = first_fault(outcomes) if self.job.stop else None
        if fault is not None:
            return Failure(task.index, "fault", told(fault))
        given, job = digest_of(samples), self.job
        return write_shard(job.folder, task.index, job.name, job.key, given, outcomes)


def first_fault(outcomes: Sequence[Outcome]) -> Rejected | None:
    """The first that is broken, if any is."""
    return next((one for one in outcomes if isinstance(one, Rejected) and one.fault), None)


def told(rejected: Rejected) -> str:
    """A rejected sample for a message."""
    return f"{rejected.id}: {rejected.reason}" + (f" ({rejected.text})" if rejected.text else "")


def set_threads(count: int) -> int | None:
    """Make torch compute in so many threads, where it is loaded; returns how many they were.

    They decide in which order sums are taken, and so the last bits of a result.
    """
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_num_threads"):
        return None
    before = torch.get_num_threads()
    if before != count:
        torch.set_num_threads(count)
    return before


def devices(device: str) -> list[str]:
    """The devices that workers of this process may use, one each in turn.

    Raises:
        ValueError: CUDA is asked for, and there is none.
    """
    if device == "cpu":
        return ["cpu"]
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count and device == "cuda":
        raise ValueError("model.device is cuda, but torch sees no CUDA device. Use cpu or auto.")
    if count and "LOCAL_RANK" in os.environ:  # each process of a launch has one
        return [f"cuda:{int(os.environ['LOCAL_RANK']) % count}"]
    return [f"cuda:{number}" for number in range(count)] or ["cpu"]


def _failure(index: int, kind: str, error: Exception) -> Failure:
    text = str(error) if kind == "opening" and str(error) else f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error))
    return Failure(index, kind, text, trace, getattr(error, "errno", None))
