"""Training steps, measured one contestant after the other in one process."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmtune.bench.contestants import contestants
from mmtune.bench.subjects import SUBJECTS, Bench, ready, view_of
from mmtune.bench.timing import Timing, timed
from mmtune.passes import Passes

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Setting:
    """What is measured, beside who.

    Attributes:
        subject: one of `SUBJECTS`.
        batch: samples of a step; None takes the subject's.
        dtype: of the base's weights.
        device: "cuda" or "cpu".
        compiled: through torch.compile.
        checkpointing: layers are recomputed in the backward pass.
        cuda_graphs: forward and backward are recorded and replayed.
        runs: steps that are measured, after `warm` that are not.
        seed: of weights and inputs.
    """

    subject: str
    batch: int | None = None
    dtype: str = "bfloat16"
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    compiled: bool = False
    checkpointing: bool = False
    cuda_graphs: bool = False
    runs: int = 20
    warm: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Line:
    """What was measured of one contestant.

    Attributes:
        name: of the contestant.
        setting: see `Setting`.
        batch: samples of a step.
        step: forward, backward, AdamW; wall time on the CPU, CUDA events on a GPU.
        busy: milliseconds of a step in which the GPU computed; None on a CPU.
        peak: bytes allocated at most, on a GPU; None on a CPU.
        trainable: parameters.
        error: why there is no measurement.
    """

    name: str
    setting: Setting
    batch: int
    step: Timing | None = None
    busy: float | None = None
    peak: int | None = None
    trainable: int = 0
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def measured(setting: Setting, names: Sequence[str]) -> Iterator[Line]:
    """Measure each contestant on a fresh copy of the same weights.

    One that cannot be made here, or runs out of memory, is a line that says so.

    Raises:
        ValueError: an unknown subject or contestant, or CUDA graphs where there can be none.
    """
    if setting.cuda_graphs and setting.device != "cuda":
        raise ValueError(f"CUDA graphs need a CUDA device; this bench runs on {setting.device}")
    if setting.cuda_graphs and setting.compiled:
        raise ValueError("choose one of compiled and CUDA graphs; a compiled pass is not recorded")
    known = contestants()
    _require("subject", [setting.subject], SUBJECTS)
    _require("contestant", names, known)
    device = torch.device(setting.device)
    batch = setting.batch or SUBJECTS[setting.subject].batch
    bench = ready(setting.subject, batch, getattr(torch, setting.dtype), device, setting.seed)
    for name in names:
        try:
            yield _measure(bench, known[name].make, setting, name, batch)
        except (ValueError, ImportError, RuntimeError) as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            yield Line(name, setting, batch, error=text)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _require(what: str, names: Sequence[str], known: Mapping[str, object]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"no {what} {name!r} to measure; there are {', '.join(known)}")


def _measure(
    bench: Bench,
    make: Callable[[nn.Module], nn.Module],
    setting: Setting,
    name: str,
    batch: int,
) -> Line:
    torch.manual_seed(setting.seed)
    device = torch.device(setting.device)
    model = make(copy.deepcopy(bench.stock)).to(device).train()
    if setting.checkpointing and not view_of(model).set_gradient_checkpointing():
        raise ValueError("this model cannot recompute its layers")
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = device.type == "cuda"
    optimiser = torch.optim.AdamW(trained, lr=1e-5, fused=fused) if trained else None
    run: Any = torch.compile(model) if setting.compiled else model

    passes = Passes(lambda batch: (bench.loss(run, batch), {}), Tensor.backward, trained, device)

    def step() -> None:
        if setting.cuda_graphs:
            passes(bench.inputs)
        else:
            bench.loss(run, bench.inputs).backward()
        if optimiser is not None:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    for left in reversed(range(setting.warm)):
        if fused and left == 0:  # a recording is made in the last of three
            torch.cuda.reset_peak_memory_stats(device)
        step()
    if setting.cuda_graphs and not passes.replayed:
        raise ValueError("what this model does in a pass cannot be recorded")
    timing = timed(step, device, setting.runs, warm=0)
    peak = torch.cuda.max_memory_allocated(device) if fused else None
    busy = _busy(step) if fused else None
    return Line(name, setting, batch, timing, busy, peak, sum(p.numel() for p in trained))


def _busy(step: Callable[[], None], steps: int = 3) -> float:
    """Milliseconds of a step in which kernels ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return sum(e.self_device_time_total for e in found.key_averages()) / steps / 1e3
