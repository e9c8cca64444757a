"""The training of an editor as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmtune.report.html import fill
from mmtune.report.numbers import Fact, duration
from mmtune.report.plots import curve

if TYPE_CHECKING:
    from editing.meta.running import MetaRun

HEADER = ("", "validation at the best step")
TOTALS = {
    "loss": "training loss",
    "eval_loss": "validation loss",
    "eval_success": "validation: share of edits that took",
}


def render_page(run: MetaRun, log: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> str:
    """The page of a finished run, from the lines of its metrics.jsonl."""
    keys = dict.fromkeys(key for line in log for key in line)
    parts = [k for k in keys if k.startswith(("loss_", "eval_")) and k not in TOTALS]
    return fill(
        "edit_training.html",
        title=run.config.name,
        summary=f"{run.config.editor} trained for {run.config.model.name}",
        facts=facts_of(run),
        notes=run.notes,
        header=HEADER,
        lines=lines_of(run),
        totals=_curves(log, TOTALS),
        parts=_curves(log, {key: _titled(key) for key in sorted(parts)}),
        manifest=manifest,
    )


def facts_of(run: MetaRun) -> list[Fact]:
    """What the training was, in the order of importance."""
    result = run.result
    stopped = "stopped early" if result.stopped_early else "all that were allowed"
    return [
        Fact("edits that took", f"{100 * result.validation['success']:.1f} %", "on validation"),
        Fact("best step", f"{result.best_step:,}", f"of {result.steps:,}, {stopped}"),
        Fact("trained parameters", f"{result.parameters:,}"),
        Fact("training time", duration(result.seconds)),
    ]


def lines_of(run: MetaRun) -> list[tuple[str, str]]:
    """The best validation, as rows of texts: the loss first, then its parts, then success."""
    return [(name.replace("_", " "), f"{v:.4f}") for name, v in run.result.validation.items()]


def _titled(key: str) -> str:
    kind, _, name = key.partition("_")
    return f"{'training' if kind == 'loss' else 'validation'}: {name.replace('_', ' ')}"


def _curves(log: Sequence[Mapping[str, Any]], wanted: Mapping[str, str]) -> list[str]:
    found = []
    for key, title in wanted.items():
        points = [(line["step"], line[key]) for line in log if key in line]
        if points:
            steps, values = zip(*points, strict=True)
            found.append(curve(title, steps, values))
    return found
