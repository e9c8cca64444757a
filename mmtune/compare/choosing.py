"""The learning rate of each method, chosen on the val split from the same rates for all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mmtune.compare.cells import Outcome
from mmtune.compare.config import CompareConfig
from mmtune.metrics.seeds import SeedMean, over_seeds
from mmtune.report.numbers import LOWER_IS_BETTER
from mmtune.runs import write_text

SEARCH = "search.jsonl"


@dataclass(frozen=True)
class Choice:
    """What the search found for one method.

    Attributes:
        method: its row.
        metric: what decided, on the val split.
        tried: rate -> mean over the search's seeds; None where a run failed or is missing.
        best: the rate with the best mean, the lower one where two are equal; None where no rate has
            all its runs.
        errors: first error of each rate that failed.
    """

    method: str
    metric: str
    tried: dict[float, SeedMean | None]
    best: float | None
    errors: dict[float, str]

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or highest tried: a better one may lie beyond."""
        return len(self.tried) > 1 and self.best in (min(self.tried), max(self.tried))


def choices(config: CompareConfig, primary: str, outcomes: Sequence[Outcome]) -> list[Choice]:
    """The best rate of each method by the mean over the search's seeds."""
    assert config.search is not None
    metric = config.search.metric or primary
    found = []
    for method in config.methods:
        tried: dict[float, SeedMean | None] = {}
        errors: dict[float, str] = {}
        for rate in config.search.lr:
            runs = [
                o for o in outcomes if o.cell.method == method and o.cell.config.training.lr == rate
            ]
            done = [o.results["after"][metric]["value"] for o in runs if o.status == "done"]
            tried[rate] = over_seeds(done) if len(done) == len(config.search.seeds) else None
            failed = [o.error for o in runs if o.status == "failed"]
            if failed:
                errors[rate] = failed[0]
        whole = {rate: mean.value for rate, mean in tried.items() if mean is not None}
        better = min if metric.split()[-1] in LOWER_IS_BETTER else max
        goal = better(whole.values(), default=None)
        best = min((rate for rate, value in whole.items() if value == goal), default=None)
        found.append(Choice(method, metric, tried, best, errors))
    return found


def write_choices(found: Sequence[Choice], root: Path) -> None:
    """Write search.jsonl: one line per method."""
    lines = [json.dumps({**asdict(choice), "at_edge": choice.at_edge}) for choice in found]
    write_text(root / SEARCH, "".join(line + "\n" for line in lines))


def as_yaml(found: Sequence[Choice]) -> str:
    """The chosen rates as lines of a comparison config."""
    lines = ["methods:"]
    for choice in found:
        if choice.best is not None:
            lines += [f"  {choice.method}:", f"    training: {{lr: {choice.best!r}}}"]
    return "\n".join(lines)
