"""Checkpoints of an editor's training: everything that decides how it goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from mmtune.checkpoints import TrainingError, sync
from mmtune.runs import write_folder, write_json

if TYPE_CHECKING:
    from torch import nn

NETWORK, OPTIMISER = "network.safetensors", "optimiser.pt"
GENERATORS, STATE = "generators.safetensors", "state.json"


@dataclass
class State:
    """Where a training is.

    Attributes:
        step: steps done.
        best: the lowest validation loss so far; None before the first.
        best_step: after how many steps it was.
        validation: all numbers of that validation.
        stale: validations since then.
        seconds: wall time, without this process's own.
        sums: totals and counts of the line of metrics.jsonl that comes next.
    """

    step: int = 0
    best: float | None = None
    best_step: int = 0
    validation: dict[str, float] = field(default_factory=dict)
    stale: int = 0
    seconds: float = 0.0
    sums: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """What changes from step to step: network, optimiser, and what random numbers come next."""

    network: nn.Module
    optimiser: torch.optim.Optimizer
    generator: torch.Generator
    device: torch.device

    def generators(self) -> dict[str, torch.Tensor]:
        """The states of our own generator and of torch's global ones."""
        states = {"own": self.generator.get_state(), "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def set_generators(self, states: Mapping[str, torch.Tensor]) -> None:
        """Put back what `generators` gave."""
        self.generator.set_state(states["own"])
        torch.set_rng_state(states["torch"])
        if self.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)


def best_folder(folder: Path, step: int) -> Path:
    """Where the editor of the best validation waits to become `trained`."""
    return folder / f"best-{step}"


def save(folder: Path, trained: Trained, state: State) -> None:
    """Write checkpoint-STEP, whole or not at all, and drop what it makes superfluous."""
    tensors = {n: t.detach().cpu().contiguous() for n, t in trained.network.state_dict().items()}

    def fill(to: Path) -> None:
        save_file(tensors, to / NETWORK)
        save_file(trained.generators(), to / GENERATORS)
        torch.save(trained.optimiser.state_dict(), to / OPTIMISER)
        write_json(to / STATE, asdict(state))
        sync(to)

    newest = folder / f"checkpoint-{state.step}"
    write_folder(newest, fill)
    kept = {newest, best_folder(folder, state.best_step)}
    for path in folder.iterdir():
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def restore(folder: Path, trained: Trained) -> State | None:
    """Go back to the newest checkpoint; None where there is none.

    Raises:
        TrainingError: it is of another network, or damaged.
    """
    found = [p for p in folder.glob("checkpoint-*") if (p / STATE).is_file()]
    if not found:
        return None
    newest = max(found, key=lambda path: int(path.name.rpartition("-")[2]))
    try:
        state = State(**json.loads((newest / STATE).read_text(encoding="utf-8")))
        trained.network.load_state_dict(load_file(newest / NETWORK))
        optimiser: Any = torch.load(newest / OPTIMISER, map_location="cpu", weights_only=True)
        trained.optimiser.load_state_dict(optimiser)
        trained.set_generators(load_file(newest / GENERATORS))
    except Exception as error:  # each of the readers raises its own
        raise TrainingError(
            f"{newest} cannot be resumed from: {error!r:.300}. Start again with --overwrite."
        ) from error
    return state
