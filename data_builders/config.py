"""The configs of `mmtune build`: dataclasses <- YAML <- dotted overrides; all mistakes at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from data_builders.recipes import Recipe, recipes
from editing.config import EditModelOptions
from editing.ranges import Count, Seed
from mmtune.config import check_keys, checked, name_of, reading, section
from mmtune.suggestions import did_you_mean
from mmtune.yaml_source import YamlSource, as_yaml, listed, plain

SECTIONS = (
    "name", "seed", "recipe", "model", "source", "pools", "stages", "assemble", "engine",
    "shard_size", "limit", "pool_limit", "on_fault",
)  # fmt: skip
POOLS = ("text", "image")
LOCALITY = "locality"
SHARD_SIZE = 64
OnFault = Literal["skip", "stop"]


@dataclass(frozen=True)
class EngineOptions:
    """Where stages run; the result is the same everywhere.

    Attributes:
        kind: "local" runs processes of this machine; "ray" runs actors of Ray Data.
        workers: processes or actors that stages run in, each with a device of its own where there
            are several; every one loads the models.
        address: of a running Ray cluster that sees the build's folder under the same path; None
            starts Ray on this machine.
        threads: of each process on the CPU. Another number may change the last bits of what
            models compute, and so must not depend on the number of workers.
    """

    kind: Literal["local", "ray"] = "local"
    workers: Count = 1
    address: str | None = None
    threads: Count = 1

    def __post_init__(self) -> None:
        if self.kind == "local" and self.address is not None:
            raise ValueError(f"address needs kind: ray, got {self.address!r} with kind: local")


@dataclass(frozen=True)
class Choice:
    """What fills a place of the build.

    Attributes:
        by: its name: of a source its format; empty where there is one thing alone.
        options: an instance of its options dataclass.
    """

    by: str
    options: Any


@dataclass(frozen=True)
class BuildConfig:
    """A build of an editing data set, fully resolved.

    Attributes:
        name: names the run folder.
        seed: what is drawn for a sample follows from it and the sample's id.
        recipe: "evqa" or "eic".
        model: the model that data are made for.
        source: where samples come from.
        pools: "text", "image" -> where questions come from that edits must not touch.
        stages: slot -> what fills it, "locality" with an empty name.
        assemble: how files are written (`data_builders.stages.assemble.AssembleOptions`).
        engine: see its class.
        shard_size: samples that are worked on and written at a time.
        limit: samples kept by select that are enough; None looks at all.
        pool_limit: likewise, of the questions of each pool.
        on_fault: "skip" sets aside and counts what is broken, "stop" ends the build there; it makes
            shards with faults of an earlier run again, so that what was mended since gets in.
        path: the file that it was read from.
    """

    name: str
    seed: int
    recipe: str
    model: EditModelOptions
    source: Choice
    pools: Mapping[str, Choice]
    stages: Mapping[str, Choice]
    assemble: Any
    engine: EngineOptions
    shard_size: int
    limit: int | None
    pool_limit: int | None
    on_fault: OnFault
    path: str = field(default="", compare=False)


def load_build_config(name: str | os.PathLike[str], overrides: Iterable[str] = ()) -> BuildConfig:
    """Read the config of `mmtune build`.

    Args:
        name: a YAML file, or the name of a shipped config.
        overrides: `dotted.key=value` items, such as "stages.imagine.steps=30".

    Raises:
        ConfigError: with every mistake there is, not only the first.
    """
    from data_builders.stages.assemble import AssembleOptions

    with reading(name, overrides) as source:
        raw = source.values
        run_name = name_of(source, SECTIONS)
        recipe = _recipe(source)
        return BuildConfig(
            name=run_name,
            seed=checked(source, ("seed",), Seed, raw.get("seed", 0)),
            recipe=recipe.name if recipe else "",
            model=section(source, "model", EditModelOptions),
            source=_source(source, ("source",), raw.get("source")),
            pools=_pools(source),
            stages=_stages(source, recipe),
            assemble=section(source, "assemble", AssembleOptions),
            engine=section(source, "engine", EngineOptions),
            shard_size=checked(source, ("shard_size",), Count, raw.get("shard_size", SHARD_SIZE)),
            limit=checked(source, ("limit",), Count | None, raw.get("limit")),
            pool_limit=checked(source, ("pool_limit",), Count | None, raw.get("pool_limit")),
            on_fault=checked(source, ("on_fault",), OnFault, raw.get("on_fault", "skip")),
            path=source.path,
        )


def to_yaml(config: BuildConfig) -> str:
    """The resolved config as YAML that `load_build_config` reads back to an equal config."""
    document = {
        "name": config.name,
        "seed": config.seed,
        "recipe": config.recipe,
        "model": plain(config.model),
        "source": _document(config.source, "format"),
        "pools": {name: _document(one, "format") for name, one in config.pools.items()},
        "stages": {slot: _document(one, "by") for slot, one in config.stages.items()},
        "assemble": plain(config.assemble),
        "engine": plain(config.engine),
        "shard_size": config.shard_size,
        "limit": config.limit,
        "pool_limit": config.pool_limit,
        "on_fault": config.on_fault,
    }
    return as_yaml(document)


def _document(choice: Choice, chooser: str) -> dict[str, Any]:
    return ({chooser: choice.by} if choice.by else {}) | plain(choice.options)


def _recipe(source: YamlSource) -> Recipe | None:
    known, name = recipes(), source.values.get("recipe")
    if name in known:
        return known[name]
    got = "it is missing" if name is None else f"got {name!r}"
    text = f"expected one of {listed(known)}, {got}.{did_you_mean(str(name), known)}"
    source.add(("recipe",), text)
    return None


def _source(source: YamlSource, at: tuple[str, ...], raw: Any) -> Any:
    from data_builders.sources import sources

    return _choice(source, at, raw, "format", sources())


def _pools(source: YamlSource) -> dict[str, Choice]:
    raw = source.values.get("pools")
    if not isinstance(raw, dict):
        text = "expected a mapping such as {text: {format: …}, image: {format: …}}"
        source.add(("pools",), f"{text}, {'it is missing' if raw is None else f'got {raw!r}'}")
        return {}
    check_keys(source, raw, POOLS, ("pools",))
    return {name: _source(source, ("pools", name), raw.get(name)) for name in POOLS}


def _stages(source: YamlSource, recipe: Recipe | None) -> dict[str, Choice]:
    """What fills each slot of the recipe, and how locality is joined."""
    from data_builders.stages import stages
    from data_builders.stages.locality import LocalityOptions

    raw = source.values.get("stages")
    if raw is not None and not isinstance(raw, dict):
        text = f"expected a mapping such as {{select: {{by: questions}}}}, got {raw!r}"
        source.add(("stages",), text)
        return {}
    if recipe is None:
        return {}
    every = raw or {}
    check_keys(source, every, (*recipe.slots, LOCALITY), ("stages",))
    known, found = stages(), {}
    for slot, by in recipe.slots.items():
        at, own = ("stages", slot), every.get(slot)
        own = {"by": by} if own is None else own
        if isinstance(own, dict):
            own = {"by": by, **own}
            if own["by"] == by:
                own = {**recipe.settings.get(slot, {}), **own}
        found[slot] = _choice(source, at, own, "by", known.get(slot, {}))
    at, own = ("stages", LOCALITY), every.get(LOCALITY)
    options = checked(source, at, LocalityOptions, {} if own is None else own)
    return found | {LOCALITY: Choice("", options)}


def _choice(
    source: YamlSource, at: tuple[str, ...], raw: Any, chooser: str, known: Mapping[str, Any]
) -> Any:
    """What the key `chooser` names with its settings; None after a mistake."""
    if not isinstance(raw, dict) or not isinstance(raw.get(chooser), str):
        got = "it is missing" if raw is None else f"got {raw!r}"
        text = f"expected a mapping with the key {chooser}, one of {listed(known)}; {got}"
        source.add(at, text)
        return None
    name = raw[chooser]
    if name not in known:
        text = f"no {chooser} {name!r}; there are {listed(known)}.{did_you_mean(name, known)}"
        source.add((*at, chooser), text)
        return None
    own = {key: value for key, value in raw.items() if key != chooser}
    return Choice(name, checked(source, at, known[name].options, own, (chooser,)))
