"""Ray Data: actors on this machine, or on those of a cluster that shares the build's folder."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from data_builders.engines.base import Engine, Failure, Job, Result, Worker, devices
from data_builders.shards import Shard, Task
from mmtune.runs import RunError

if TYPE_CHECKING:
    from data_builders.config import EngineOptions

STORE = 200 * 2**20  # bytes of the object store: only names of files go through it
BLOCKS = 2_000  # tasks that are sent one by one; of more, several go together


class RayEngine(Engine):
    """Every worker is an actor that opens the stage once."""

    def __init__(self, options: EngineOptions, device: str) -> None:
        super().__init__(options, device)
        self.started = False
        try:
            import ray  # noqa: F401
        except ImportError as error:
            raise RunError(
                f"engine.kind: ray needs Ray Data ({error}). Run `pip install mmtune[ray]`, or set "
                "engine.kind: local."
            ) from error

    def run(self, job: Job, tasks: Iterator[Task]) -> Iterator[Result]:
        every = list(tasks)
        if not every:
            return
        results = self._results(job, every)
        import ray.exceptions

        try:
            for row in results.iter_rows():
                yield _result(row["result"])
        except ray.exceptions.RayError as error:
            text = f"an actor is gone: {_last_line(error)}"
            yield Failure(None, "killed", text, str(error))

    def close(self) -> None:
        if self.started:
            import ray

            ray.shutdown()
            self.started = False

    def _results(self, job: Job, tasks: list[Task]) -> Any:
        """The data set of results, which are computed as it is read."""
        ray = self._ray()
        items = [{"task": task.as_json()} for task in tasks]
        blocks = min(len(items), BLOCKS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # arguments of actors are to be given in other ways
            return ray.data.from_items(items, override_num_blocks=blocks).map_batches(
                Actor,
                fn_constructor_args=(job, self.device, os.getcwd()),
                compute=ray.data.ActorPoolStrategy(size=min(self.options.workers, len(items))),
                batch_size=1,
                num_gpus=self._gpus(ray),
                max_restarts=0,  # an actor that dies ends the build: it would die of the same again
                max_task_retries=0,
            )

    def _ray(self) -> Any:
        """Ray, connected."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        if not ray.is_initialized():
            own: dict[str, Any] = {"num_cpus": self.options.workers, "object_store_memory": STORE}
            ray.init(
                address=self.options.address or "local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **({} if self.options.address else own),
            )
            self.started = True
        ray.data.DataContext.get_current().enable_progress_bars = False
        return ray

    def _gpus(self, ray: Any) -> float | None:
        """What each actor has of a GPU, where there are any."""
        there = 0 if self.device == "cpu" else ray.cluster_resources().get("GPU", 0)
        return min(1.0, there / self.options.workers) if there else None


class Actor:
    """A worker as Ray Data calls it: a batch of one task goes in, its result comes out."""

    def __init__(self, job: Job, device: str, where: str) -> None:
        if os.path.isdir(where):
            os.chdir(where)  # paths of models in a config are relative to it
        self.job, self.device = job, device
        self.worker: Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Work on each task of the batch."""
        self.worker = self.worker or Worker(self.job, devices(self.device)[0])
        results = [self.worker.attempt(Task.of_json(str(text))) for text in batch["task"]]
        return {"result": [_as_json(result) for result in results]}


def _as_json(result: Result) -> str:
    kind = "shard" if isinstance(result, Shard) else "failure"
    return json.dumps({kind: dataclasses.asdict(result)})


def _result(text: str) -> Result:
    raw = json.loads(text)
    return Shard(**raw["shard"]) if "shard" in raw else Failure(**raw["failure"])


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
