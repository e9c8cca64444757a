"""A build: its steps one after the other, each from where it was left."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from data_builders.builds import StageReport
from data_builders.config import BuildConfig, to_yaml
from data_builders.engines import engine_of
from data_builders.engines.base import Engine
from data_builders.manifests import MANIFEST, Done
from data_builders.pictures import MADE
from data_builders.progress import FULL, POLL, StepError, counted, full_disk
from data_builders.running import DOES, reports
from data_builders.samples import Rejected
from data_builders.shards import outcomes_until, rank, read_outcomes, shard_file, sweep, world
from data_builders.steps import STAGES, Plan, Step, plan
from mmtune.runs import RunError, manifest, write_json, write_text
from mmtune.suggestions import did_you_mean

FAULTS, CONFIG = "faults.jsonl", "config.yaml"
ADVICE = {
    "source": "Mend the files that it reads, or name others.",
    "select": "Take another source, or settings of stages.select by which more is kept.",
    "rephrase": "Take another stages.rephrase.by, or settings that ask for less.",
    "imagine": "Take another stages.imagine.by, or settings that ask for less.",
    "filter": "Take thresholds in stages.filter by which more is kept.",
    "consistent": "The model answers no question of this pool steadily: name another pool.",
    "locality": "Name larger pools (pools.text, pools.image), or allow stages.locality.reuse.",
    "assemble": "Mend what comes before, as the reasons say.",
}


@dataclass(frozen=True)
class Built:
    """What a build came to.

    Attributes:
        folder: of the build.
        reports: of the steps that are finished, in order.
        defects: of the records that were written.
        complete: whether all steps are finished.
        notes: what else should be said.
    """

    folder: Path
    reports: list[StageReport]
    defects: int = 0
    complete: bool = True
    notes: list[str] = field(default_factory=list)

    @property
    def faults(self) -> int:
        """Samples that were set aside because something was broken."""
        return sum(sum(report.faults.values()) for report in self.reports)


def build(
    config: BuildConfig,
    runs: Path,
    remake: bool = False,
    until: str | None = None,
    command: Sequence[str] | None = None,
) -> Built:
    """Run the steps of a build that are not finished.

    Args:
        config: what to build.
        runs: the folder of the build is below it, called as the config is.
        remake: make stale steps again; without it nothing that is there is removed.
        until: the step after which to stop; None runs all.
        command: for the manifest; None takes that of this process.

    Raises:
        RunError: stale steps; a step that fails, or keeps nothing; a full disk. What is finished
            stays so, and the same call goes on.
    """
    folder = (runs / config.name).resolve()
    check_folder(folder)
    work = plan(config, folder)
    steps = steps_until(work, until)
    with _full_disks_told(folder), closing(engine_of(config.engine, config.model.device)) as engine:
        _settle(work, remake)
        _begin(work, steps, command or sys.argv)
        try:
            for step in steps:
                _run(step, work, engine)
        finally:
            if rank() == 0:
                _write_faults(work)
    ended = work.done(steps[-1])
    return Built(
        folder=folder,
        reports=reports(work),
        defects=ended.defects if ended else 0,
        complete=len(steps) == len(work.steps),
        notes=work.notes(),
    )


def check_folder(folder: Path) -> None:
    """RunError where a folder holds something else than a build."""
    if not folder.exists() or not any(p for p in folder.iterdir() if not p.name.startswith(".")):
        return  # a process that was killed may have left a hidden file
    try:
        held = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        if "recipe" in held:
            return
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        pass
    raise RunError(
        f"{folder} exists and holds no build ({CONFIG} with a recipe), so it is left alone. "
        "Choose another name with name=NAME."
    )


def steps_until(work: Plan, until: str | None) -> list[Step]:
    """The steps up to a named one. ValueError lists those there are."""
    steps = list(work.steps.values())
    if until is None:
        return steps
    if until not in work.steps:
        known = ", ".join(work.steps)
        raise ValueError(
            f"--until {until}: this build has the steps {known}.{did_you_mean(until, work.steps)}"
        )
    return steps[: list(work.steps).index(until) + 1]


def stale_text(stale: dict[str, list[str]]) -> str:
    """Which steps are stale and why, a line each."""
    return "\n".join(f"  {name}: {'; '.join(why)}" for name, why in stale.items())


def _settle(work: Plan, remake: bool) -> None:
    """Remove stale steps, if that is asked for. Raises RunError where it is needed and not."""
    stale = work.stale()
    if not stale:
        return
    if not remake:
        raise RunError(
            f"{work.context.folder} was made by another config; these steps are stale:\n"
            f"{stale_text(stale)}\n"
            "--remake removes their outputs and makes them again; name=NAME builds beside them. "
            "Nothing was removed."
        )
    if rank():
        while stale:
            time.sleep(POLL)
            for name in stale:
                work.reread(work.steps[name])
            stale = {name: why for name, why in work.stale().items() if name in stale}
        return
    for name in stale:
        step = work.steps[name]
        shutil.rmtree(step.folder)
        if step.kind == "stage":
            shutil.rmtree(work.context.pictures.roots[MADE] / step.slot, ignore_errors=True)
        work.reread(step)


def _begin(work: Plan, steps: Sequence[Step], command: Sequence[str]) -> None:
    """Write what the folder opens with, where anything is to be done."""
    folder = work.context.folder
    if rank() or all(work.done(step) for step in steps):
        return
    folder.mkdir(parents=True, exist_ok=True)
    if world() == 1:
        _sweep(folder)
    write_text(folder / CONFIG, to_yaml(work.config))
    files = [Path(path) for made in work.now.values() for path in made.files]
    config = work.config
    write_json(folder / MANIFEST, manifest(config.seed, config.model.device, files, list(command)))


def _sweep(folder: Path) -> None:
    """Remove what a killed process left half written."""
    sweep(folder)
    for place in (folder, *(folder / STAGES).glob("*")):
        for path in place.glob(".*"):  # as `write_text` calls what is not whole yet
            if path.is_file():
                path.unlink(missing_ok=True)


def _run(step: Step, work: Plan, engine: Engine) -> None:
    """Finish one step, unless it is finished; RunError where it keeps nothing."""
    if rank():
        work.reread(step)
    done = work.done(step)
    if done is None and (rank() == 0 or step.kind == "stage"):
        started, record = time.monotonic(), work.manifest(step).begun()
        if rank() == 0:
            work.save(step, replace(record, done=None))
        try:
            done = DOES[step.kind](step, work, engine)
        finally:
            spent = record.seconds + time.monotonic() - started
            if rank() == 0:
                work.save(step, replace(record, seconds=spent, done=done))
    while (done := work.done(step)) is None:  # another process of this launch writes it
        time.sleep(POLL)
        work.reread(step)
    if not done.kept:
        raise StepError(_nothing_kept(step, done))


def _nothing_kept(step: Step, done: Done) -> str:
    by = f"{step.name} ({step.choice.by})" if step.choice.by else step.name
    away = counted([*done.rejected.items(), *((f"{k} (fault)", n) for k, n in done.faults.items())])
    given = f"none of {done.samples:,} samples is kept" if done.samples else "there is no sample"
    again = " What changes is made again with --remake." if done.samples else ""
    return f"{by}: {given}{f': {away}' if away else ''}. {ADVICE.get(step.slot, '')}{again}"


def _write_faults(work: Plan) -> None:
    """Write every fault of the finished steps, a line each; no file where there is none."""
    path, lines = work.context.folder / FAULTS, []
    for step in work.steps.values():
        done = work.done(step)
        if done is None or not done.faults:
            continue
        read = (read_outcomes(shard_file(step.folder, i)) for i in range(len(done.shards)))
        for outcomes in outcomes_until(read, step.limit):
            for one in outcomes:
                if isinstance(one, Rejected) and one.fault:
                    lines.append(json.dumps({"stage": step.name} | dataclasses.asdict(one)))
    if lines:
        write_text(path, "\n".join(lines) + "\n")
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _full_disks_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise RunError(full_disk(folder)) from error
