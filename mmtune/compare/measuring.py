"""What a trained adapter costs at inference: file size, forward time, and whether it merges."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

    from mmtune.config import RunConfig
    from mmtune.tasks.base import Task

ROUNDS, WARM_UP = 9, 2


@dataclass(frozen=True)
class Measured:
    """The costs of using an adapter.

    Attributes:
        adapter_bytes: size of the adapter's weights on disk.
        forward_seconds: of one batch through the model with its adapter, not merged.
        base_seconds: of the same batch through the stock model.
        forward_ratio: the median over rounds of the one divided by the other.
        merges: whether the adapter folds into the stock weights, which brings the ratio to 1.
    """

    adapter_bytes: int
    forward_seconds: float
    base_seconds: float
    forward_ratio: float
    merges: bool


def measure(config: RunConfig, task: Task, model: PeftModel, adapter: Path) -> dict[str, Any]:
    """The costs of a trained adapter. The model is used up: merging comes last.

    Forward passes are the task's loss on one training batch, in eval mode without gradients; the
    model and a stock model take turns, so that a busy machine slows both.
    """
    from mmtune.finetuning import load_model

    device = next(model.parameters()).device
    stock = load_model(config).model.to(device).eval()
    model.eval()
    count = min(config.training.batch_size, len(task.train_dataset))  # type: ignore[arg-type]
    task.set_epoch(0)
    batch = task.collate([task.train_dataset[i] for i in range(count)])
    batch = {name: value.to(device) for name, value in batch.items()}
    passes = [lambda m=m: task.loss(m, batch) for m in (stock, model)]
    with torch.no_grad():
        base, adapted = in_turns(passes, device)
    return asdict(
        Measured(
            adapter_bytes=sum(p.stat().st_size for p in adapter.rglob("*.safetensors")),
            forward_seconds=statistics.median(adapted),
            base_seconds=statistics.median(base),
            forward_ratio=statistics.median(a / b for a, b in zip(adapted, base, strict=True)),
            merges=_merges(model),
        )
    )


def in_turns(
    calls: Sequence[Callable[[], Any]], device: torch.device, rounds: int = ROUNDS
) -> list[list[float]]:
    """Seconds of each call in each round; the order turns round from one round to the next."""
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(-WARM_UP, rounds):
        order = list(enumerate(calls))
        for index, call in order if number % 2 else reversed(order):
            _wait_for(device)
            begun = time.perf_counter()
            call()
            _wait_for(device)
            if number >= 0:
                seconds[index].append(time.perf_counter() - begun)
    return seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _merges(model: nn.Module) -> bool:
    """Try it; methods with modules of their own refuse with a ValueError."""
    try:
        model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    except ValueError:
        return False
    return True
