"""A run's folder: config, manifest, metrics, adapter and results, each written whole or not."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from mmtune.tasks.base import Evaluation, Metric

PACKAGES = (
    "mmtune", "torch", "torchvision", "transformers", "peft", "open_clip_torch", "accelerate",
    "safetensors", "numpy", "pillow",
)  # fmt: skip


class RunError(RuntimeError):
    """A run folder that cannot be used as asked; the message says what to do instead."""


@dataclass(frozen=True)
class Results:
    """What a finished run found; the content of results.json.

    Attributes:
        before, after, difference: metrics of the test split by name; differences are paired.
        trainable, total: parameters.
        seconds: wall time of training.
        peak_memory: bytes; `memory_kind` says of what.
        steps: optimiser steps.
        split: the split that was evaluated.
        step_seconds: the median step, without waiting for data; None where a resumed run had none
            left to take.
        primary: the metric to quote.
    """

    before: Mapping[str, Metric]
    after: Mapping[str, Metric]
    difference: Mapping[str, Metric]
    trainable: int
    total: int
    seconds: float
    peak_memory: int
    memory_kind: str
    steps: int
    split: str = "test"
    step_seconds: float | None = None
    primary: str = ""

    @property
    def share(self) -> float:
        """Trainable parameters as a percentage of all."""
        return 100 * self.trainable / max(self.total, 1)


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, below `runs/` unless told otherwise."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def adapter(self) -> Path:
        """The trained adapter, in PEFT's format."""
        return self.path / "adapter"

    @property
    def results(self) -> Path:
        """Written last: a run that has it is finished."""
        return self.path / "results.json"

    def check(self, resume: bool = False, overwrite: bool = False) -> None:
        """Refuse a folder that is taken, before anything is loaded.

        Raises:
            RunError: the folder holds another run or no run at all, or cannot be resumed.
        """
        if resume and overwrite:
            raise RunError("--resume goes on with a run and --overwrite deletes it; give one.")
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not self.config.is_file():
            raise RunError(
                f"{self.path} exists and holds no run (no config.yaml), so it is left alone. "
                "Choose another name with name=NAME."
            )
        finished = self.results.exists()
        if resume and finished:
            raise RunError(f"{self.path} is finished; there is nothing to resume.")
        if not resume and not overwrite:
            go_on = "" if finished else "--resume to go on with it, "
            raise RunError(
                f"{self.path} holds {'a finished' if finished else 'an unfinished'} run. "
                f"Use {go_on}--overwrite to replace it, or name=NAME for another folder."
            )

    def check_holds_run(self) -> None:
        """RunError where the folder has no config or no adapter."""
        for path in (self.config, self.adapter):
            if not path.exists():
                raise RunError(f"{self.path} is no finished run: {path.name} is missing.")

    def start(self, config_text: str, resume: bool = False, overwrite: bool = False) -> None:
        """Make the folder ready for a run with this config. Raises RunError as `check` does."""
        self.check(resume, overwrite)
        if self.path.exists() and overwrite:
            shutil.rmtree(self.path)
        elif self.path.exists() and resume and self.config.exists():
            self._check_resume(config_text)
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config, config_text)

    def _check_resume(self, config_text: str) -> None:
        then = self.config.read_text(encoding="utf-8").splitlines()
        now = config_text.splitlines()
        changed = [f"{a.strip()} -> {b.strip()}" for a, b in zip(then, now, strict=False) if a != b]
        if then != now:
            raise RunError(
                f"{self.config} differs from the config given: {'; '.join(changed[:5])}. "
                "Resume with the same config and overrides, or start again with --overwrite."
            )

    def save_adapter(self, model: PeftModel) -> None:
        """Write adapter/ with PEFT's own files."""
        write_folder(
            self.adapter, lambda to: model.save_pretrained(str(to), save_embedding_layers=False)
        )

    def save_results(self, results: Results) -> None:
        """Write results.json, which marks the run as finished."""
        write_json(self.results, {**asdict(results), "share_percent": results.share})

    def log(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; an unfinished last line is left out."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return []
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]


def manifest(
    seed: int, device: str, data_files: Iterable[Path], command: list[str]
) -> dict[str, Any]:
    """What is needed to do a run again: versions, seed, hashes of the data, commit, command."""
    return {
        "command": shlex.join([Path(command[0]).name, *command[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "device": device,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "git_commit": git_commit(Path(__file__).resolve().parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "data": {
            str(path): {"sha256": sha256(path), "bytes": path.stat().st_size}
            for path in sorted(set(data_files))
        },
    }


def git_commit(folder: Path) -> str | None:
    """The commit of the checkout that holds `folder`, "+changes" added where files differ."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        if not (Path(git("rev-parse", "--show-toplevel")) / "pyproject.toml").exists():
            return None
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_named_in(value: Any) -> list[Path]:
    """Every existing file that some text inside `value` (dataclasses included) names."""
    if isinstance(value, str | os.PathLike):
        try:
            return [Path(value)] if Path(value).is_file() else []
        except (OSError, ValueError):
            return []
    if hasattr(value, "__dataclass_fields__"):
        value = [getattr(value, name) for name in value.__dataclass_fields__]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [path for item in value for path in files_named_in(item)]
    return []


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name in its folder, then rename it."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name, then rename it."""
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, temporary, metadata)
        os.chmod(temporary, 0o644)  # safetensors may write for the owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_predictions(found: Evaluation, path: Path) -> int:
    """Write what an evaluation predicted, as evaluation servers take it. Returns how many.

    Raises:
        RunError: the task predicts nothing that could be submitted.
    """
    predictions = found.details.get("predictions")
    if predictions is None:
        raise RunError(
            "this task makes no predictions to write; leave --predictions out. Tasks that answer "
            "or describe do (vqa, captioning)."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(predictions, ensure_ascii=False) + "\n")
    return len(predictions)


def write_folder(path: Path, fill: Callable[[Path], Any]) -> None:
    """Let `fill` write into a temporary folder beside `path`, then rename it to `path`.

    A folder that is already there is replaced only once the new one is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.partial-"))
    try:
        partial.chmod(0o755)
        fill(partial)
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
