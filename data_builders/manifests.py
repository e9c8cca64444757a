"""What a stage's outputs depend on, and how a change of it is noticed and told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmtune.runs import PACKAGES, sha256, write_json

MANIFEST = "manifest.json"
LIBRARIES = (*PACKAGES, "diffusers", "datasets")


@dataclass(frozen=True)
class Done:
    """How a stage ended.

    Attributes:
        limit: kept samples that were enough; None where all samples were looked at.
        input: digest of what it was given, see `Manifest.output` of the stages above.
        samples, kept: that went in and came out.
        rejected, faults: the others, by reason.
        shards: (kept samples that count, digest) of every file.
        defects: of the records that were written (assemble).
    """

    limit: int | None
    input: str
    samples: int
    kept: int
    rejected: dict[str, int]
    faults: dict[str, int]
    shards: list[tuple[int, str]] = field(default_factory=list)
    defects: int = 0

    @property
    def output(self) -> str:
        """Names what came out by its content."""
        return hash_of([list(shard) for shard in self.shards])


@dataclass(frozen=True)
class Manifest:
    """A stage's manifest.json.

    Attributes:
        stage: its name.
        key: hash of `what` and of the keys of the stages above.
        what: settings, files, and all else that its outputs depend on.
        above: name of a stage that its samples come from -> that stage's key.
        versions: of libraries; others may be used later, and then a note says so.
        files: path -> size, time of change and hash, so that files are hashed once.
        started: when it began.
        seconds: of wall time so far; what a killed process spent is not in it.
        done: how it ended; None while it is not finished.
    """

    stage: str
    key: str
    what: dict[str, Any]
    above: dict[str, str]
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    started: str = ""
    seconds: float = 0.0
    done: Done | None = None

    def save(self, folder: Path) -> None:
        """Write it into the stage's folder, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MANIFEST, asdict(self))

    def begun(self) -> Manifest:
        """With the time and the libraries of now, unless it began earlier."""
        if self.started:
            return self
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return replace(self, started=now, versions=versions())


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a stage's folder; None where there is none that can be read."""
    try:
        raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        done = raw.pop("done")
        if done is not None:
            shards = [(kept, digest) for kept, digest in done.pop("shards")]
            done = Done(**done, shards=shards)
        return Manifest(**raw, done=done)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def hash_of(value: Any) -> str:
    """Of anything that JSON holds."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def hashed(paths: Iterable[str], before: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Path -> size, time of change and SHA-256 of each file.

    Args:
        paths: of files.
        before: the same of an earlier run; a file of the same size and time is not read again.

    Raises:
        OSError: one that cannot be read.
    """
    found = {}
    for path in paths:
        state = Path(path).stat()
        seen = {"bytes": state.st_size, "modified": state.st_mtime_ns}
        known = before.get(path, {})
        same = all(known.get(name) == value for name, value in seen.items())
        found[path] = seen | {"sha256": known["sha256"] if same else sha256(Path(path))}
    return found


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two `what`s, such as "settings.threshold changed from 0.5 to 0.6"."""
    before, after = _flat(then), _flat(now)
    found = []
    for key in dict.fromkeys((*before, *after)):
        if key not in after:
            found.append(f"{key} was {_short(before[key])} and is gone")
        elif key not in before:
            found.append(f"{key} is new: {_short(after[key])}")
        elif before[key] != after[key]:
            if key.startswith("files."):
                found.append(f"{key.removeprefix('files.')} has other content")
            else:
                texts = f"from {_short(before[key])} to {_short(after[key])}"
                found.append(f"{key} changed {texts}")
    return found


def versions() -> dict[str, str]:
    """Installed versions of the libraries that outputs may depend on."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(value, Mapping) or not value:
        return {at: value}
    found: dict[str, Any] = {}
    for key, own in value.items():
        found |= _flat(own, f"{at}.{key}" if at else str(key))
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
