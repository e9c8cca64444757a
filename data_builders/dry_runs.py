"""What a build would do, found without a model and without writing anything."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data_builders.config import BuildConfig
from data_builders.pipeline import check_folder
from data_builders.samples import Rejected
from data_builders.steps import Plan, State, Step, plan


@dataclass(frozen=True)
class Outlook:
    """What there is to do.

    Attributes:
        steps: in order.
        states: name of a step -> how far it is.
        stale: name of a stale step -> why it is.
        samples: name of a step that reads a source -> samples in it.
        faults: likewise, what is broken, by reason.
        notes: what else should be said.
    """

    steps: list[Step]
    states: Mapping[str, State]
    stale: Mapping[str, list[str]]
    samples: Mapping[str, int]
    faults: Mapping[str, Mapping[str, int]]
    notes: list[str]


def dry_run(config: BuildConfig, runs: Path) -> Outlook:
    """Look at the files of a build, count its samples and say how far each step is.

    Raises:
        RunError: the folder holds something else, or files are missing.
        DataError: a source that cannot be read.
    """
    folder = (runs / config.name).resolve()
    check_folder(folder)
    samples: dict[str, int] = {}
    faults: dict[str, Mapping[str, int]] = {}
    with tempfile.TemporaryDirectory() as made:  # sources may write pictures as they are read
        work = plan(config, folder, Path(made))
        states = work.states()
        for step in work.steps.values():
            if step.kind == "collect":
                samples[step.name], faults[step.name] = _counted(step, work)
    steps = list(work.steps.values())
    return Outlook(steps, states, work.stale(), samples, faults, work.notes())


def _counted(step: Step, work: Plan) -> tuple[int, Mapping[str, int]]:
    done = work.done(step)
    if done is not None:
        return done.kept, done.faults
    count, reasons = 0, Counter()
    for outcome in work.sources[step.root].read(work.context.pictures):
        if isinstance(outcome, Rejected):
            reasons[outcome.reason] += 1
        else:
            count += 1
    return count, reasons
