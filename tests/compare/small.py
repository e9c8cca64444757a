"""A comparison on the fake task: two methods that train in milliseconds, and one that fails.

Cells run in processes of their own; `install` is what `compare(setup=...)` calls first in each.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from peft import LoraConfig
from pydantic import Field
from torch import nn

import mmtune.backbones
import mmtune.tasks
import mmtune.tuners.registry
from mmtune.backbones.base import ImageSpec, Loaded
from mmtune.compare.config import load_comparison
from mmtune.compare.running import compare
from mmtune.tasks.base import Evaluation, Metric
from tests.fake_task import FakeTask

CONFIG = """\
name: small
seeds: [0, 1]
model: {name: fake}
task: {name: small}
data:
  train: {format: folder, path: train}
  val: {format: folder, path: val}
  test: {format: folder, path: test}
training: {epochs: 2, batch_size: 4, lr: 1e-2, log_every: 1, save_every: 4, device: cpu}
methods:
  narrow:
    tuner: {method: low, rank: 1}
  wide:
    tuner: {method: low, rank: 4}
    training: {lr: 2e-2}
"""
BROKEN = """\
  broken:
    tuner: {method: broken}
"""
SEARCH = "search: {lr: [1e-3, 1e-2, 1e-1], seeds: [0, 1]}\n"
INPUTS = {"val": 11, "test": 12}  # seeds of the inputs that a split holds
KILL, EVALUATED = "TEST_KILL", "TEST_EVALUATED"


@dataclass(frozen=True)
class LowOptions:
    rank: Annotated[int, Field(ge=1)] = 4


@dataclass(frozen=True)
class NoOptions:
    pass


@dataclass(frozen=True)
class SmallOptions:
    count: int = 24


class SmallTask(FakeTask):
    """The fake task with splits; kills the whole comparison where the environment says so."""

    name = "small"
    options = SmallOptions

    def __init__(self, options, data, loaded, seed):
        super().__init__(options.count)
        self.data, self.seed = data, seed

    def loss(self, model, batch):
        if model.training and os.environ.get(KILL) == f"{self.seed}:{self.losses + 1}":
            os.kill(multiprocessing.parent_process().pid, signal.SIGKILL)
            time.sleep(60)  # this process must not outlive its parent
            raise AssertionError("the cell outlived its comparison")
        return super().loss(model, batch)

    def evaluate(self, model, split="test", progress=True):
        assert getattr(self.data, split) is not None
        x = torch.randn(40, 6, generator=torch.Generator().manual_seed(INPUTS[split]))
        with torch.no_grad():
            was = model.training
            model.eval()
            error = 100 * float((model(x) - x.flip(1)).square().mean())
            model.train(was)
        if EVALUATED in os.environ:
            with Path(os.environ[EVALUATED]).open("a") as file:
                file.write(f"{type(model).__name__} {split}\n")
        metrics = {"fit": Metric(-error, -error - 1, -error + 1, 40)}
        return Evaluation(metrics | {"error MnR": Metric(error, error, error, 40)}, "fit")

    def compare(self, before, after):
        value = after.metrics["fit"].value - before.metrics["fit"].value
        return {"fit": Metric(value, value - 1, value + 1, 40)}

    def gallery(self, before, after, limit=12):
        return []


class NoSites:
    def prepare(self):
        pass

    def sites(self):
        return []


def load(name, dtype="float32"):
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    spec = ImageSpec(8, (0.5,) * 3, (0.5,) * 3)
    return Loaded(model, NoSites(), spec, lambda texts: {}, 8, name, len)  # type: ignore[arg-type]


def low(model, options):
    return LoraConfig(target_modules=["0", "2"], r=options.rank)


def broken(model, options):
    raise ValueError("no place for it\nand a second line")


def method(name, options, build):
    return mmtune.tuners.registry.Method(name, "", "", options, build)


def install(patch=setattr):
    """Put the fake task, model and methods in place of those of the toolkit."""
    torch.set_num_threads(1)
    methods = {"low": method("low", LowOptions, low), "broken": method("broken", NoOptions, broken)}
    patch(mmtune.tasks, "tasks", lambda: {"small": SmallTask})
    patch(mmtune.backbones, "load", load)
    patch(mmtune.tuners.registry, "methods", lambda: methods)


if __name__ == "__main__":
    from tests.compare import small

    small.install()
    config = load_comparison(sys.argv[1])

    def tell(text: str) -> None:
        if os.environ.get(KILL) and text.startswith(os.environ[KILL]):
            os.kill(os.getpid(), signal.SIGKILL)

    compare(config, Path(sys.argv[2]), tell, setup=small.install)
