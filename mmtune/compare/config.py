"""Comparison configs: a run config whose `methods:` say what differs; all mistakes at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mmtune.config import (
    RunConfig,
    check_keys,
    check_name,
    checked,
    find_config,
    name_of,
    reading,
    resolve,
)
from mmtune.yaml_source import ConfigError, Key, YamlSource, dotted_key, listed, read_yaml

SHARED = ("name", "model", "task", "data", "training")
SECTIONS = (*SHARED, "seeds", "metrics", "methods", "search")
# What a method may choose for itself; everything else is the budget, the same for all.
OWN_TRAINING = ("lr", "weight_decay", "warmup", "schedule", "max_grad_norm")

Seed = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class SearchOptions:
    """The search for each method's learning rate: every rate gets the steps of a whole run.

    Attributes:
        lr: the rates that every method tries.
        metric: what decides, the mean over seeds; None means the task's primary metric.
        split: what the metric is computed on; the test split takes no part in a search.
        seeds: one run each for every method and rate.
    """

    lr: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    metric: str | None = None
    split: Literal["val"] = "val"
    seeds: Annotated[list[Seed], Field(min_length=1)] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        for name in ("lr", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} lists a value twice, got {values!r}; keep one of each")


@dataclass(frozen=True)
class CompareConfig:
    """A comparison, fully resolved.

    Attributes:
        name: names its folder.
        seeds: every method is trained once with each.
        metrics: columns of the table; empty means the task's primary metric.
        methods: name of a row -> its run, with the first seed.
        search: how learning rates are searched for; None where they are not.
        document: the raw values, overrides included.
        source: the file that it was read from.
    """

    name: str
    seeds: list[int]
    metrics: list[str]
    methods: dict[str, RunConfig]
    search: SearchOptions | None
    document: dict[str, Any]
    source: str

    @property
    def any_run(self) -> RunConfig:
        """One of the runs, for what they all share."""
        return next(iter(self.methods.values()))


@dataclass(frozen=True)
class Cell:
    """One training run of the grid: `folder` is relative to the comparison's own."""

    method: str
    seed: int
    config: RunConfig
    split: str
    folder: str


def cells(config: CompareConfig) -> list[Cell]:
    """The runs of the comparison: all seeds of a method, then the next method.

    A method may so build on those above it, as fusion does on adapters.
    """
    return [
        _cell("cells", f"{name}-seed{seed}", name, seed, run, "test")
        for name, run in config.methods.items()
        for seed in config.seeds
    ]


def search_cells(config: CompareConfig) -> list[Cell]:
    """The runs of the search: every method with every rate and seed, evaluated on val.

    The test split is not even named in their configs.
    """
    search = config.search
    if search is None:
        text = "missing; --search needs it, such as search: {lr: [1e-4, 1e-3, 1e-2]}"
        source = YamlSource(config.source, {}, {})
        source.add(("search",), text)
        raise ConfigError(source.mistakes)
    found = []
    for seed in search.seeds:
        for rate in search.lr:
            for name, run in config.methods.items():
                data = replace(run.data, test=None)
                tried = replace(run, data=data, training=replace(run.training, lr=rate))
                folder = f"{name}-lr{rate!r}-seed{seed}"
                found.append(_cell("search", folder, name, seed, tried, search.split))
    return found


def _cell(parent: str, folder: str, method: str, seed: int, run: RunConfig, split: str) -> Cell:
    return Cell(method, seed, replace(run, name=folder, seed=seed), split, f"{parent}/{folder}")


def is_comparison(path: Path) -> bool:
    """Whether a config is one for `mmtune compare`."""
    return "methods" in read_yaml(find_config(path)).values


def load_comparison(name: str | os.PathLike[str], overrides: Iterable[str] = ()) -> CompareConfig:
    """Read a comparison config.

    Args:
        name: a YAML file, or the name of a shipped config.
        overrides: `dotted.key=value` items, such as "methods.lora.tuner.rank=4".

    Raises:
        ConfigError: with every mistake there is, not only the first.
    """
    with reading(name, overrides) as source:
        raw = source.values
        run_name = name_of(source, SECTIONS)
        seeds = checked(source, ("seeds",), list[Seed], raw.get("seeds", [0]))
        if seeds is not None and (not seeds or len(set(seeds)) < len(seeds)):
            source.add(
                ("seeds",), f"expected different whole numbers, got {seeds!r}. Try [0, 1, 2]."
            )
        metrics = checked(source, ("metrics",), list[str], raw.get("metrics", []))
        search = None
        if raw.get("search") is not None:
            search = checked(source, ("search",), SearchOptions, raw["search"])
        methods = dict(_methods(source, seeds or [0]))
        if not methods:
            resolve(_RunSource(source))  # for the mistakes of the shared sections
        for role in ("train", "test", *(["val"] if search else [])):
            _require_split(source, role)
        return CompareConfig(run_name, seeds or [], metrics, methods, search, raw, source.path)


class _RunSource(YamlSource):
    """The raw values of one method's run; its mistakes go to the comparison's source, once."""

    def __init__(self, whole: YamlSource, method: str | None = None) -> None:
        own = {} if method is None else whole.values["methods"][method]
        self.whole, self.method = whole, method
        self.own_training = own.get("training") or {}
        values = {key: whole.values[key] for key in SHARED[1:] if key in whole.values}
        values["name"] = "cell"
        if "tuner" in own:
            values["tuner"] = own["tuner"]
        shared = values.get("training") or {}
        if isinstance(shared, Mapping):
            values["training"] = {**shared, **self.own_training}
        super().__init__(whole.path, values, {})

    def add(self, key: Key, text: str) -> None:
        own = key[0] == "tuner" or (
            key[0] == "training" and key[1:2] and key[1] in self.own_training
        )
        if own and self.method is None:
            return
        key = ("methods", self.method, *key) if own and self.method is not None else key
        if not any(m.key == dotted_key(key) and m.text == text for m in self.whole.mistakes):
            self.whole.add(key, text)


def _methods(source: YamlSource, seeds: list[int]) -> Iterator[tuple[str, RunConfig]]:
    """Name and run of each method; mistakes go to the source."""
    methods = source.values.get("methods")
    if not isinstance(methods, dict) or not methods:
        text = "expected a mapping such as lora: {tuner: {method: lora}}"
        source.add(("methods",), f"{text}, got {methods!r}")
        return
    for name, own in methods.items():
        at = ("methods", name)
        check_name(source, at, name)
        if not isinstance(own, dict):
            source.add(at, f"expected a mapping with tuner (and training), got {own!r}")
            continue
        check_keys(source, own, ("tuner", "training"), at)
        training = own.get("training") or {}
        if not isinstance(training, dict):
            source.add((*at, "training"), f"expected a mapping, got {training!r}")
            continue
        for key in training:
            if key not in OWN_TRAINING:
                text = (
                    f"a method has only {listed(OWN_TRAINING)} of its own; every method has the "
                    f"same budget. Set {key} in training"
                )
                source.add((*at, "training", key), text)
        run = resolve(_RunSource(source, name))
        yield name, replace(run, seed=seeds[0], source=source.path)


def _require_split(source: YamlSource, role: str) -> None:
    data = source.values.get("data")
    if not isinstance(data, dict) or data.get(role) is None:
        why = "to search" if role == "val" else "to compare"
        source.add(("data", role), f"must be set {why}, such as {{format: folder, path: DIR}}")
