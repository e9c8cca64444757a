"""The base model's evaluation: once for a whole comparison."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.compare.config import Cell
from mmtune.compare.process import call_apart, call_here
from mmtune.config import load_config, to_yaml
from mmtune.runs import RunError, write_json, write_text

if TYPE_CHECKING:
    from mmtune.compare.cells import Setup
    from mmtune.tasks.base import Evaluation


@dataclass(frozen=True)
class Base:
    """The base model before any tuning.

    Attributes:
        metrics: name -> {value, low, high, n}; intervals are over queries.
        primary: the metric that ranks models.
        manifest: versions, device, data hashes, commit.
        evaluation: with its details, for paired differences; None where read from disk.
    """

    metrics: dict[str, dict[str, float]]
    primary: str
    manifest: dict[str, Any]
    evaluation: Evaluation | None = None

    @property
    def queries(self) -> int:
        """The most queries that a metric counts."""
        return max((int(metric["n"]) for metric in self.metrics.values()), default=0)


def read_base(cell: Cell, root: Path) -> Base | None:
    """The base evaluation on disk, where it is of the model, task and data of `cell`."""
    path = _path(cell, root)
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["of"] != _subject(cell):
        return None
    return Base(found["metrics"], found["primary"], found["manifest"])


def evaluate_base(cell: Cell, root: Path, setup: Setup = None, apart: bool = True) -> Base:
    """Evaluate the base model on the cell's split, and write base-SPLIT.json; see `run_cell`.

    Raises:
        RunError: the model or its data cannot be used; the text is that of the error.
    """
    output = root / f"base-{cell.split}.txt"
    config = root / f"base-{cell.split}.yaml"
    write_text(config, to_yaml(cell.config))
    call = call_apart if apart else call_here
    ended = call(_evaluate, (config, cell.split), output, setup)
    if ended.error is not None:
        with output.open("a", encoding="utf-8") as file:
            file.write(ended.traceback)
        raise RunError(f"the base model was not evaluated ({output}):\n{ended.error}")
    evaluation, manifest = ended.value
    metrics = {name: asdict(metric) for name, metric in evaluation.metrics.items()}
    base = Base(metrics, evaluation.primary, manifest, evaluation)
    found = {"metrics": metrics, "primary": base.primary, "manifest": manifest}
    write_json(_path(cell, root), {"of": _subject(cell), **found})
    return base


def _path(cell: Cell, root: Path) -> Path:
    return root / f"base-{cell.split}.json"


def _evaluate(path: Path, split: str) -> tuple[Evaluation, dict[str, Any]]:
    from mmtune.finetuning import evaluate, run_manifest

    config = load_config(path)
    return evaluate(config, None, split), run_manifest(config)


def _subject(cell: Cell) -> dict[str, Any]:
    """What the base evaluation depends on."""
    import yaml

    document = yaml.safe_load(to_yaml(cell.config))
    named = {key: document[key] for key in ("model", "task", "data")}
    return {**named, "device": cell.config.training.device}
