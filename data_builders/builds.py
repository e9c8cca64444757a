"""A build as the parts that look at all of it see it: what it is about, and how its stages went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_builders.config import BuildConfig
    from data_builders.pictures import Pictures
    from data_builders.sources.base import Source
    from data_builders.stages.base import Context


@dataclass(frozen=True)
class StageReport:
    """How a finished stage went.

    Attributes:
        name: of the step in this build, such as "select", or "text-consistent" of a pool.
        slot: its section of the config; "source" for samples that were read.
        by: what filled the slot, such as "diffusers"; of a source, its format.
        settings: what of its settings goes into the data card.
        samples: that went in.
        kept: that came out.
        rejected: of no use here, by reason.
        faults: something was broken, by reason.
        seconds: of wall time, over all the runs that it took.
        versions: of the libraries that it began with.
    """

    name: str
    slot: str
    by: str
    settings: Mapping[str, Any]
    samples: int
    kept: int
    rejected: Mapping[str, int] = field(default_factory=dict)
    faults: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Build:
    """A build whose samples are ready to be written.

    Attributes:
        config: fully resolved.
        folder: of the build, runs/NAME.
        pictures: where its pictures are read and written.
        context: what its stages are told.
        reports: of the stages so far, in order.
        sources: "source", "text" or "image" (the pools of locality) -> what it was read from.
    """

    config: BuildConfig
    folder: Path
    pictures: Pictures
    context: Context
    reports: Sequence[StageReport]
    sources: Mapping[str, Source[Any]]

    def report(self, name: str) -> StageReport:
        """The report of one stage. Raises KeyError: it did not run."""
        return {report.name: report for report in self.reports}[name]
