"""The steps of a build in order, what each depends on, and how far each is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_builders.config import LOCALITY, POOLS, Choice
from data_builders.manifests import (
    MANIFEST,
    Done,
    Manifest,
    changes,
    hash_of,
    hashed,
    read_manifest,
)
from data_builders.pictures import MADE, Pictures
from data_builders.recipes import recipes
from data_builders.shards import shard_file
from data_builders.stages.base import Context
from mmtune.runs import RunError
from mmtune.yaml_source import plain

if TYPE_CHECKING:
    from data_builders.config import BuildConfig
    from data_builders.sources.base import Source
    from data_builders.stages.base import Stage

Kind = Literal["collect", "stage", "join", "assemble"]
State = Literal["done", "begun", "to do", "stale"]
SOURCE, COLLECT, ASSEMBLE = "source", "collect", "assemble"
STAGES = "stages"  # the folder of all steps


@dataclass(frozen=True)
class Step:
    """One step of a build.

    Attributes:
        name: such as "select", or "consistent-text" of a pool; `--until` takes it.
        kind: "collect" reads a source, "stage" runs a `Stage` on shards, "join" and "assemble" look
            at all samples.
        slot: its section of the config.
        choice: what fills it.
        folder: of its outputs.
        above: names of the steps that its samples come from.
        limit: kept samples that are enough.
        root: of a source: its root of pictures.
    """

    name: str
    kind: Kind
    slot: str
    choice: Choice
    folder: Path
    above: tuple[str, ...]
    limit: int | None = None
    root: str = ""


@dataclass(frozen=True)
class Plan:
    """All steps of a build with what they are made of.

    Attributes:
        config: of the build.
        steps: name -> step, in order.
        sources: root -> what it is read from.
        context: what stages are told.
        now: name of a step -> the manifest that it has when it begins today.
        found: name of a step -> the manifest on disk, as it was last read or written.
    """

    config: BuildConfig
    steps: Mapping[str, Step]
    sources: Mapping[str, Source[Any]]
    context: Context
    now: dict[str, Manifest] = field(default_factory=dict)
    found: dict[str, Manifest | None] = field(default_factory=dict)

    def stage_class(self, step: Step) -> type[Stage[Any]]:
        """What fills the slot of a step of kind "stage"."""
        from data_builders.stages import stages

        return stages()[step.slot][step.choice.by]

    def manifest(self, step: Step) -> Manifest:
        """What is on disk where it goes with this config, else a new one."""
        found, new = self.found[step.name], self.now[step.name]
        if found is None or found.key != new.key:
            return new
        return replace(found, files=new.files)

    def save(self, step: Step, manifest: Manifest) -> None:
        """Write a step's manifest."""
        manifest.save(step.folder)
        self.found[step.name] = manifest

    def reread(self, step: Step) -> None:
        """Look at what other processes of the build have written."""
        self.found[step.name] = read_manifest(step.folder)

    def done(self, step: Step) -> Done | None:
        """How the step ended; None where it has not, or not with what it is given today."""
        found = self.manifest(step).done
        if found is None or found.limit != step.limit or found.input != self.given(step):
            return None
        if self.config.on_fault == "stop" and found.faults:
            return None  # what was broken may have been mended: those shards are made again
        return found if self._there(step, found) else None

    def given(self, step: Step) -> str:
        """Names what the step is given by its content; empty for what reads a source."""
        ends = [self.manifest(self.steps[name]).done for name in step.above]
        return hash_of([end.output if end else "" for end in ends]) if ends else ""

    def states(self) -> dict[str, State]:
        """How far each step is."""
        stale, found = self.stale(), {}
        for step in self.steps.values():
            if step.name in stale:
                found[step.name] = "stale"
            elif all(found[name] == "done" for name in step.above) and self.done(step):
                found[step.name] = "done"
            else:
                begun = any(step.folder.glob("shard-*.jsonl"))
                found[step.name] = "begun" if begun else "to do"
        return found

    def stale(self) -> dict[str, list[str]]:
        """Steps whose outputs do not go with the config, in order -> why."""
        found: dict[str, list[str]] = {}
        for step in self.steps.values():
            if not any(step.folder.glob("[!.]*")):
                continue  # a process that was killed may have left a hidden file
            then, now = self.found[step.name], self.now[step.name]
            if then is None:
                found[step.name] = [f"its {MANIFEST} is missing or damaged"]
            elif then.key != now.key:
                found[step.name] = changes(then.what, now.what) or [
                    f"comes after {name}"
                    for name in now.above
                    if then.above.get(name) != now.above[name]
                ]
        return found

    def notes(self) -> list[str]:
        """Finished or begun steps that were made with other versions of libraries."""
        from data_builders.manifests import versions

        now, found = versions(), []
        for step in self.steps.values():
            then = self.found[step.name]
            if then is None or not then.versions:
                continue
            other = [
                f"{name} {then.versions.get(name, 'none')} (now {now.get(name, 'none')})"
                for name in dict.fromkeys((*then.versions, *now))
                if then.versions.get(name) != now.get(name)
            ]
            if other:
                found.append(f"{step.name} was made with {', '.join(other)}")
        return found

    def _there(self, step: Step, done: Done) -> bool:
        if step.kind == "assemble":
            return (self.context.folder / "data").is_dir()
        names = {path.name for path in step.folder.glob("shard-*.jsonl")}
        return all(shard_file(step.folder, i).name in names for i in range(len(done.shards)))


def plan(config: BuildConfig, folder: Path, made: Path | None = None) -> Plan:
    """Work out the steps of a build, and hash the files that they depend on.

    Args:
        config: of the build.
        folder: of the build.
        made: where pictures are written, if not in that folder.

    Raises:
        RunError: files that are missing, all of them.
    """
    sources = _sources(config)
    roots = {name: path for one in sources.values() for name, path in one.roots().items()}
    pictures = Pictures({MADE: made or folder / MADE} | {n: p.resolve() for n, p in roots.items()})
    context = Context(config.seed, config.model, pictures, folder)
    steps = {step.name: step for step in _steps(config, folder)}
    found = Plan(config, steps, sources, context)
    missing = [f"{path} (images of {n})" for n, path in roots.items() if not path.is_dir()]
    for step in steps.values():
        found.reread(step)
        files = _files(step, found, missing)
        what = _what(step, found, files)
        above = {name: found.now[name].key for name in step.above}
        key = hash_of([what, above])
        found.now[step.name] = Manifest(step.name, key, what, above, files=files)
    if missing:
        raise RunError("files that the build reads are missing:\n  " + "\n  ".join(missing))
    return found


def _sources(config: BuildConfig) -> dict[str, Source[Any]]:
    from data_builders.sources import sources

    known = sources()
    named = {SOURCE: config.source, **{name: config.pools[name] for name in POOLS}}
    return {root: known[one.by](one.options, root) for root, one in named.items()}


def _steps(config: BuildConfig, folder: Path) -> list[Step]:
    recipe = recipes()[config.recipe]
    found: list[Step] = []

    def add(name: str, kind: Kind, slot: str, choice: Choice, above: Sequence[str], **more: Any):
        place = folder / STAGES / f"{len(found) + 1:02d}-{name}"
        found.append(Step(name, kind, slot, choice, place, tuple(above), **more))
        return name

    last = add(COLLECT, "collect", SOURCE, config.source, (), root=SOURCE)
    for number, slot in enumerate(recipe.samples):
        limit = None if number else config.limit
        last = add(slot, "stage", slot, config.stages[slot], (last,), limit=limit)
    ends = [last]
    for pool in POOLS:
        end = add(f"{COLLECT}-{pool}", "collect", SOURCE, config.pools[pool], (), root=pool)
        for number, slot in enumerate(recipe.pool):
            limit = None if number else config.pool_limit
            end = add(f"{slot}-{pool}", "stage", slot, config.stages[slot], (end,), limit=limit)
        ends.append(end)
    last = add(LOCALITY, "join", LOCALITY, config.stages[LOCALITY], ends)
    add(ASSEMBLE, "assemble", ASSEMBLE, Choice("", config.assemble), (last,))
    return found


def _what(step: Step, plan: Plan, files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All that a step's outputs depend on beside the steps above."""
    config, choice = plan.config, step.choice
    found: dict[str, Any] = {"by": choice.by} if choice.by else {}
    found["settings"] = plain(choice.options)
    if step.kind != "collect":
        found["seed"] = config.seed
    if step.kind == "stage":
        found["version"] = plan.stage_class(step).version
        kind = plain(config.model)
        found["model"] = {name: kind[name] for name in ("name", "dtype", "templates")}
    if step.kind != "assemble":
        found["shard_size"] = config.shard_size
    found["files"] = {path: seen["sha256"] for path, seen in files.items()}
    return found


def _files(step: Step, plan: Plan, missing: list[str]) -> dict[str, Any]:
    """The files of a step with their hashes; those that are missing are added to the list."""
    names: Iterable[str] = ()
    if step.kind == "collect":
        names = plan.sources[step.root].files()
    elif step.kind == "stage":
        names = plan.stage_class(step)(step.choice.options, plan.context).files()
    there = []
    for name in dict.fromkeys(names):
        if Path(name).is_file():
            there.append(name)
        else:
            missing.append(f"{name} ({step.name}: {step.slot} {step.choice.by})")
    before = plan.found[step.name]
    return hashed(there, before.files if before else {})
