"""The runs below a folder, and runs by name; what is broken is named, and stops nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmtune.run_listing.base import CONFIG, BrokenRunError, Reader, Run, read_yaml
from mmtune.run_listing.editing import Build, EditEvaluation
from mmtune.run_listing.measurements import Bench, Probe
from mmtune.run_listing.trainings import Comparison, EditorTraining, Training
from mmtune.suggestions import did_you_mean

# Each looks at a folder in turn; a new kind of run is a class in this list.
READERS: tuple[Reader, ...] = (
    Training(),
    Comparison(),
    EditEvaluation(),
    EditorTraining(),
    Build(),
    Probe(),
    Bench(),
)
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Listing:
    """What is below a folder.

    Attributes:
        root: the folder.
        runs: by kind, the newest of each kind first.
        others: names of folders that hold no run.
    """

    root: Path
    runs: Sequence[Run]
    others: Sequence[str]


def listing(root: Path) -> Listing:
    """Read every run right below a folder.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; name the folder of runs with --runs DIR.")
    runs: list[Run] = []
    others: list[str] = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        found = runs_in(folder, folder.name)
        runs += found
        if not found:
            others.append(folder.name)
    kinds = [*(reader.kind for reader in READERS), UNKNOWN]
    runs.sort(key=lambda run: run.started, reverse=True)
    runs.sort(key=lambda run: kinds.index(run.kind))
    return Listing(root, runs, others)


def runs_in(folder: Path, name: str) -> list[Run]:
    """What a folder holds, "broken" runs included; nothing where it holds no run."""
    if folder.name.startswith("."):
        left = ".partial-" in folder.name
        why = "left half-written by a process that was killed; delete it"
        return [Run(UNKNOWN, name, folder, "broken", why)] if left else []
    kind = UNKNOWN
    try:
        config = read_yaml(folder / CONFIG) if (folder / CONFIG).exists() else {}
        for reader in READERS:
            if reader.claims(folder, config):
                kind = reader.kind
                return reader.read(folder, config, name)
        if config:
            raise BrokenRunError(f"{CONFIG} is of no command that this version knows")
    except (
        Exception
    ) as error:  # whatever a damaged file leads to: the others are listed all the same
        own = isinstance(error, BrokenRunError)
        why = str(error) if own else f"a file has other content than it should: {error!r}"
        return [Run(kind, name, folder, "broken", why)]
    return []


def named(names: Sequence[str], root: Path) -> list[Run]:
    """Runs by name below `root`, or by folder; all of one kind.

    Raises:
        ValueError: there is no such run, it is broken, or they are of several kinds.
    """
    known = {run.name: run for run in listing(root).runs} if root.is_dir() else {}
    found = [known[name] if name in known else _at(name, root, known) for name in names]
    for run in found:
        if run.state == "broken":
            raise ValueError(f"{run.name} is broken: {run.why}")
    if len({run.kind for run in found}) > 1:
        kinds = ", ".join(f"{run.name} ({run.kind})" for run in found)
        raise ValueError(f"runs of one kind can be compared, got {kinds}")
    return found


def _at(name: str, root: Path, known: dict[str, Run]) -> Run:
    for folder in (root / name, Path(name)):
        if folder.is_dir():
            found = runs_in(folder, name.rstrip("/"))
            if len(found) == 1:
                return found[0]
            several = ", ".join(run.name for run in found)
            text = f"holds several runs: {several}. Name one" if found else "holds no run"
            raise ValueError(f"{folder} {text}.")
    names = ", ".join(known) or "none"
    raise ValueError(f"no run {name!r} in {root}; there are {names}.{did_you_mean(name, known)}")


def interval_of(kind: str) -> str:
    """What the brackets of a kind's numbers hold."""
    return next((reader.interval for reader in READERS if reader.kind == kind), "")
