"""How much memory a training step takes, counted without computing it.

The step (loss and backward pass) runs on fake tensors: they have shapes, dtypes and storages, but
no numbers. Every storage that an operation makes is counted from its making to its release, so what
autograd saves, what activation checkpointing recomputes and what autocast copies is counted as it
happens. Weights and the optimiser's state are added by their sizes.

Not counted: what a GPU library works in, the allocator's rounding and fragments, the CUDA context,
and that later steps read a queue of features which the first finds empty. Operations are those of
the CPU, whose fused attention keeps what the GPU's keeps.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmtune.device import checkpoint_activations
from mmtune.training import hooks_of

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

    from mmtune.config import TrainingOptions
    from mmtune.tasks.base import Task

ADAM_STATES = 2  # tensors that AdamW keeps for each trained one
STEPS = 1000  # length of the run that hooks are told of: methods have schedules


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a training step.

    Attributes:
        weights: parameters and buffers of the model.
        optimizer: AdamW's two moments of what is trained.
        state: what method and task keep from the start (a momentum encoder).
        gradients: of what is trained.
        activations: the rest of the peak: inputs, what the backward pass needs, its own, and what
            the step begins to keep (a queue).
    """

    weights: int
    optimizer: int
    state: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return self.weights + self.optimizer + self.state + self.gradients + self.activations


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make while it is entered.

    Fakes hold no numbers; a program that reads one (to log it, to decide on a warning) gets 1.

    Attributes:
        live: bytes not yet released.
        peak: the most that there were at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return _one(args[0].dtype)
        before = {id(s) for s in map(_storage, tree_leaves((args, kwargs))) if s is not None}
        out = func(*args, **(kwargs or {}))
        for storage in map(_storage, tree_leaves(out)):
            # What an operation hands on (a view, an output in place) was counted, or existed.
            if storage is not None and id(storage) not in before and storage not in self._known:
                self._known.add(storage)
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes())
        return out

    def _change(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


def _one(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _storage(value: Any) -> Any:
    return value.untyped_storage() if isinstance(value, torch.Tensor) else None


def estimate_memory(
    model: PeftModel, task: Task, options: TrainingOptions, batch: Mapping[str, Tensor], seed: int
) -> MemoryEstimate:
    """Count a training step of `task` on `batch`. The model is used up: it holds fakes after it.

    Args:
        model: wrapped, on the CPU or the meta device.
        task: built with the same loaded model.
        options: precision and activation checkpointing are followed.
        batch: a micro-batch that the task collated.
        seed: of the method's hooks.

    Raises:
        RuntimeError: the step depends on the numbers in a tensor, which fakes do not have; or the
            weights are packed in four bits.
    """
    if any(hasattr(p, "quant_state") for p in model.parameters()):
        raise RuntimeError("weights packed in four bits cannot be stood in for")
    weights = _bytes([*model.parameters(), *model.buffers()])
    if options.gradient_checkpointing:
        checkpoint_activations(model)
    fakes, live = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
    with fakes:
        _imagine(model)
        inputs = {name: fakes.from_tensor(value) for name, value in batch.items()}
    half = options.precision == "bf16"
    model.train()
    with fakes, live:
        task.before_training(model)
        task.set_epoch(0)
        trained = [p for p in model.parameters() if p.requires_grad]
        hooks = hooks_of(model, task, STEPS, seed)
        state = live.live
        hooks.before_step(1)
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            loss, _ = task.loss(model, inputs)
            penalty = hooks.penalty()
        (loss if penalty is None else loss + penalty).backward()
    gradients = _bytes([p.grad for p in trained if p.grad is not None])
    return MemoryEstimate(
        weights=weights,
        optimizer=ADAM_STATES * _bytes(trained),
        state=state,
        gradients=gradients,
        activations=live.peak - state - gradients + _bytes(list(inputs.values())),
    )


def _imagine(model: nn.Module) -> None:
    """Put fakes on the CPU in the place of parameters and buffers; call it in a fake mode."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty_like(tensor, device="cpu")
            if isinstance(tensor, torch.nn.Parameter):
                empty = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
            made[id(tensor)] = empty
        return made[id(tensor)]

    originals = []  # kept until the end: an id may not be given to another tensor
    for module in model.modules():
        groups: list[dict[str, Any]] = [module._parameters, module._buffers]
        for group in groups:
            for name, tensor in group.items():
                if tensor is not None:
                    originals.append(tensor)
                    group[name] = fake(tensor)


def _bytes(tensors: list[Any]) -> int:
    """Of every tensor once, however often it is named: tied weights are."""
    sizes = {id(t): t.numel() * t.element_size() for t in tensors}
    return sum(sizes.values())
