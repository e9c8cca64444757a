"""Where a run computes, and how much memory it takes there."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmtune.checkpoints import TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from peft import PeftModel

    from mmtune.config import TrainingOptions


def device_of(options: TrainingOptions) -> torch.device:
    """The device that `options` mean for this process."""
    if options.device == "cpu" or (options.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TrainingError("training.device is cuda, but torch sees no CUDA device. Use cpu.")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def require_optimizer(options: TrainingOptions) -> None:
    """TrainingError where the optimiser that `options` name cannot run on their device."""
    if options.optimizer != "paged_adamw":
        return
    if device_of(options).type != "cuda":
        raise TrainingError(
            "training.optimizer: paged_adamw moves its state between GPU and CPU memory and needs "
            "a CUDA device; this run is on the CPU. Set training.optimizer: adamw."
        )
    if find_spec("bitsandbytes") is None:
        raise TrainingError(
            "training.optimizer: paged_adamw needs bitsandbytes. Run `pip install mmtune[qlora]`, "
            "or set training.optimizer: adamw."
        )


def checkpoint_activations(model: PeftModel) -> None:
    """Recompute activations in the backward pass. TrainingError where the model cannot."""
    from mmtune.backbones import backbone_of

    backbone = backbone_of(model)
    if not backbone.set_gradient_checkpointing():
        raise TrainingError(
            f"{type(backbone.model).__name__} cannot checkpoint activations. "
            "Set training.gradient_checkpointing: false."
        )


class Fetched:
    """Numbers on their way from a device to here; what is launched after them is not waited for.

    Args:
        first: a scalar.
        others: scalars on the same device, or numbers that are here already.
    """

    def __init__(self, first: Tensor, others: Iterable[Tensor | float]) -> None:
        self._numbers = [first, *others]
        away = [n.detach().double() for n in self._numbers if isinstance(n, Tensor)]
        together = torch.stack(away)
        self._arrived: torch.cuda.Event | None = None
        if together.is_cuda:
            self._here = torch.empty(together.shape, dtype=together.dtype, pin_memory=True)
            self._here.copy_(together, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._here = together

    def values(self) -> list[float]:
        """The numbers, as soon as they are here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        here = iter(self._here.tolist())
        return [next(here) if isinstance(n, Tensor) else float(n) for n in self._numbers]


def leave_together() -> None:
    """End this process together with the others of its group; does nothing for a single process.

    Call it last. One that leaves early breaks the others' connections, so all meet first. They go
    without C++ teardown: in torch 2.14 gloo's threads can abort an interpreter that is shutting
    down ("terminate called without an active exception"), after the work is done.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class PeakMemory:
    """The most memory taken since this was made (CUDA) or since the process began (CPU)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def peak(self) -> tuple[int, str]:
        """Bytes, and of what: "CUDA allocated" or "process RSS" (its high-water mark)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device), "CUDA allocated"
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process RSS"
