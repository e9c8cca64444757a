"""A run as a listing sees it, and what reads one kind of run from its folder."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

State = Literal["finished", "unfinished", "broken"]
Curve = Sequence[tuple[float, float]]
CONFIG, MANIFEST, RESULTS = "config.yaml", "manifest.json", "results.json"


class BrokenRunError(ValueError):
    """A folder that no command of this toolkit left like that; the message names the file."""


@dataclass(frozen=True)
class Number:
    """Something that was measured.

    Attributes:
        what: such as "reliability"; numbers of one `what` and one kind of run can be compared.
        value: of it.
        low, high: its interval; None where there is none. `Reader.interval` says which.
        of: the part of the run that it is of, such as an editor; empty for the whole run.
        form: how it is written, as `format` takes it.
        unit: of it; empty where `what` says it.
    """

    what: str
    value: float
    low: float | None = None
    high: float | None = None
    of: str = ""
    form: str = ".1f"
    unit: str = ""

    @property
    def name(self) -> str:
        """What it is, and of which part."""
        return f"{self.of}: {self.what}" if self.of else self.what

    def __str__(self) -> str:
        text = f"{self.value:{self.form}}"
        if self.low is not None and self.high is not None:
            text += f" [{self.low:{self.form}}, {self.high:{self.form}}]"
        return f"{text} {self.unit}".rstrip()


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        kind: see `Reader.kind`.
        name: its path below the folder of runs.
        folder: it is in.
        state: whether it is finished.
        why: what is missing or wrong, and how to go on; of a finished run, what to know of it.
        numbers: the headline first.
        trainable: parameters.
        seconds: that it took.
        started, commit: from its manifest; empty where that says nothing.
        report: the page to look at.
        config: the document that it was made from.
        curve: (step, training loss).
        objective: losses of one objective can be compared.
    """

    kind: str
    name: str
    folder: Path
    state: State
    why: str = ""
    numbers: Sequence[Number] = ()
    trainable: int | None = None
    seconds: float | None = None
    started: str = ""
    commit: str = ""
    report: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    curve: Curve = ()
    objective: str = ""

    @property
    def headline(self) -> Number | None:
        """The number to quote; None where there is none yet."""
        return self.numbers[0] if self.numbers else None

    def as_json(self) -> dict[str, Any]:
        """What a listing shows of it, without config and curve."""
        numbers = [
            {"name": n.name, "value": n.value, "low": n.low, "high": n.high, "unit": n.unit}
            for n in self.numbers
        ]
        return {
            "kind": self.kind,
            "name": self.name,
            "folder": str(self.folder),
            "state": self.state,
            "why": self.why,
            "headline": numbers[0] if numbers else None,
            "numbers": numbers,
            "trainable": self.trainable,
            "seconds": self.seconds,
            "started": self.started,
            "commit": self.commit,
            "report": str(self.report) if self.report else None,
        }


class Reader(ABC):
    """Reads one kind of run; it writes nothing, and loads no model.

    Attributes:
        kind: the command that makes such runs.
        interval: what the brackets of its numbers hold; empty where they have none.
    """

    kind: ClassVar[str]
    interval: ClassVar[str] = "95 % interval"

    @abstractmethod
    def claims(self, folder: Path, config: Mapping[str, Any]) -> bool:
        """Whether a folder with this config.yaml (empty: there is none) holds such a run."""

    @abstractmethod
    def read(self, folder: Path, config: Mapping[str, Any], name: str) -> list[Run]:
        """The runs in a folder that was claimed.

        Raises:
            BrokenRunError, and what comes of files with other content than they should have
            (KeyError, TypeError, ValueError, AttributeError, OSError).
        """

    def run(self, folder: Path, name: str, state: State, **facts: Any) -> Run:
        """A run of this kind; date and commit come from its manifest."""
        about = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
        return Run(self.kind, name, folder, state, **{**made_with(about), **facts})


def made_with(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """`started` and `commit` of a run from its manifest."""
    commit, _, changes = str(manifest.get("git_commit") or "").partition("+")
    return {
        "started": str(manifest.get("started", "")),
        "commit": commit[:8] + ("+" if changes else ""),
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises BrokenRunError where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BrokenRunError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise BrokenRunError(f"{path.name} holds no JSON object")
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping. Raises BrokenRunError where it is none."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        first = str(error).partition("\n")[0]
        raise BrokenRunError(f"{path.name} cannot be read: {first}") from error
    if not isinstance(found, dict):
        raise BrokenRunError(f"{path.name} holds no mapping")
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file, none where it is missing; an unfinished last one is left out.

    Raises:
        BrokenRunError: another line is no JSON object.
    """
    if not path.exists():
        return []
    found = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise BrokenRunError(f"{path.name} line {number} is no JSON: {error}") from error
        if not isinstance(value, dict):
            raise BrokenRunError(f"{path.name} line {number} holds no JSON object")
        found.append(value)
    return found


def losses(lines: Iterable[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(step, training loss) of the lines of a metrics.jsonl."""
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def there(path: Path) -> Path | None:
    """The path, where it exists."""
    return path if path.exists() else None


def number_of(
    what: str, metric: Mapping[str, Any], of: str = "", form: str = ".1f", percent: bool = False
) -> Number:
    """A stored {value, low, high, …}; `percent` writes a share so."""
    times = 100 if percent else 1
    low, high = metric.get("low"), metric.get("high")
    if low is not None and high is not None:
        low, high = low * times, high * times
    return Number(what, metric["value"] * times, low, high, of, form, "%" if percent else "")
