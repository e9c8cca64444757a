"""What each kind of step does: read, run a stage on shards, join, assemble."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_builders.builds import Build, StageReport
from data_builders.config import POOLS
from data_builders.engines.base import Engine, Job, first_fault, told
from data_builders.manifests import Done
from data_builders.progress import Progress, StepError, at_fault, bar_of, run_shards
from data_builders.samples import Outcome, Rejected, Sample
from data_builders.shards import (
    Part,
    Shard,
    cut,
    finished,
    kept_in,
    outcomes_until,
    read_outcomes,
    shard_file,
    sweep,
    world,
    write_shard,
)
from data_builders.steps import SOURCE, Plan, Step
from mmtune.batched import batched
from mmtune.data.records import DataError
from mmtune.runs import write_json
from mmtune.yaml_source import plain


def reports(work: Plan) -> list[StageReport]:
    """Of the steps that are finished, in order."""
    found = []
    for step in work.steps.values():
        done, record = work.done(step), work.manifest(step)
        if done is None or any(work.done(work.steps[name]) is None for name in step.above):
            continue
        options = step.choice.options
        shown = (
            work.stage_class(step).described(options) if step.kind == "stage" else plain(options)
        )
        found.append(
            StageReport(
                name=step.name,
                slot=step.slot,
                by=step.choice.by,
                settings=shown,
                samples=done.samples,
                kept=done.kept,
                rejected=done.rejected,
                faults=done.faults,
                seconds=record.seconds,
                versions=record.versions,
            )
        )
    return found


def _collect(step: Step, work: Plan, engine: Engine) -> Done:
    """Read a source into shards; those that are there from before are left as they are."""
    del engine
    source, size = work.sources[step.root], work.config.shard_size
    try:
        outcomes = source.read(work.context.pictures)
        with bar_of(step.name, None, "sample") as bar:
            shards = list(_written(step, work, batched(outcomes, size), bar))
    except DataError as error:
        raise StepError(f"{step.name} ({step.choice.by}): {error}") from error
    if step.root == SOURCE:
        _write_concepts(step, work, len(shards))
    return added_up(step, work, shards)


def _write_concepts(step: Step, work: Plan, shards: int) -> None:
    """Note which images of the source show which concept, for stages that look for another one."""
    from data_builders.stages.imagine import CONCEPTS

    found: dict[str, list[str]] = {}
    for index in range(shards):
        for sample in kept_in(shard_file(step.folder, index)):
            if sample.concept and sample.image:
                found.setdefault(sample.concept, []).append(sample.image)
    once = {concept: list(dict.fromkeys(images)) for concept, images in sorted(found.items())}
    write_json(work.context.folder / CONCEPTS, once)


def _stage(step: Step, work: Plan, engine: Engine) -> Done:
    """Run a stage on what the step above kept."""
    config, key = work.config, work.now[step.name].key
    strict = config.on_fault == "stop"
    tasks = cut(parts_of(step.above[0], work), config.shard_size)
    job = Job(
        name=step.name,
        key=key,
        stage=work.stage_class(step),
        settings=step.choice.options,
        context=work.context,
        folder=step.folder,
        stop=strict,
        threads=config.engine.threads,
    )
    step.folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(tasks, key, step.folder, step.limit, strict)
    try:
        return added_up(step, work, run_shards(job, progress, engine, step))
    finally:
        if world() == 1:
            sweep(step.folder)  # of workers that were stopped


def _join(step: Step, work: Plan, engine: Engine) -> Done:
    """Give every sample its questions of locality."""
    from data_builders.stages.locality import join

    del engine
    samples, *pools = (list(kept_by(name, work)) for name in step.above)
    text, image = (pools[POOLS.index(name)] for name in ("text", "image"))
    pictures, options = work.context.pictures, step.choice.options
    outcomes = join(samples, text, image, work.config.seed, options, pictures)
    batches = batched(outcomes, work.config.shard_size)
    with bar_of(step.name, len(samples), "sample") as bar:
        return added_up(step, work, list(_written(step, work, batches, bar)))


def _assemble(step: Step, work: Plan, engine: Engine) -> Done:
    """Write the files of the set."""
    from data_builders.stages.assemble import assemble

    del engine
    context = work.context
    whole = Build(
        work.config, context.folder, context.pictures, context, reports(work), work.sources
    )
    found = assemble(whole, list(kept_by(step.above[0], work)))
    report = found.report()
    with bar_of(step.name, report.samples, "sample") as bar:  # those that it left out
        shards = list(_written(step, work, [found.rejected] if found.rejected else [], bar))
    return Done(
        limit=None,
        input=work.given(step),
        samples=report.samples,
        kept=report.kept,
        rejected=dict(report.rejected),
        faults=dict(report.faults),
        shards=[(0, shard.digest) for shard in shards],
        defects=len(found.defects),
    )


def _written(
    step: Step, work: Plan, batches: Iterable[Sequence[Outcome]], bar: Any
) -> Iterator[Shard]:
    """Write outcomes that this process came to itself, unless the same ones are there."""
    key, given = work.now[step.name].key, work.given(step)
    for index, outcomes in enumerate(batches):
        fault = first_fault(outcomes) if work.config.on_fault == "stop" else None
        if fault is not None:
            raise StepError(at_fault(step.name, told(fault)))
        yield finished(step.folder, index, key, given) or write_shard(
            step.folder, index, step.name, key, given, outcomes
        )
        bar.update(len(outcomes))


def added_up(step: Step, work: Plan, shards: Sequence[Shard]) -> Done:
    """Add up shards, the last of them as far as it is needed."""
    read = (read_outcomes(shard_file(step.folder, shard.index)) for shard in shards)
    samples, ends = 0, []
    rejected, faults = Counter(), Counter()
    for shard, outcomes in zip(shards, outcomes_until(read, step.limit), strict=False):
        away = [outcome for outcome in outcomes if isinstance(outcome, Rejected)]
        rejected.update(one.reason for one in away if not one.fault)
        faults.update(one.reason for one in away if one.fault)
        samples += len(outcomes)
        ends.append((len(outcomes) - len(away), shard.digest))
    kept = sum(count for count, _ in ends)
    return Done(step.limit, work.given(step), samples, kept, dict(rejected), dict(faults), ends)


def parts_of(name: str, work: Plan) -> Iterator[Part]:
    """Where the samples are that a finished step kept."""
    step = work.steps[name]
    done = work.done(step)
    for index, (kept, _) in enumerate(done.shards if done else ()):
        yield Part(str(shard_file(step.folder, index)), 0, kept)


def kept_by(name: str, work: Plan) -> Iterator[Sample]:
    """The samples that a finished step kept."""
    for part in parts_of(name, work):
        yield from kept_in(Path(part.file))[part.start : part.stop]


DOES = {"collect": _collect, "stage": _stage, "join": _join, "assemble": _assemble}
