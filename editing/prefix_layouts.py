"""How some of a model's parameters divide its modules: those that need them, and the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

# Hooks of these always do the same with the same input: families' own, and those by which
# transformers collects hidden states.
TRUSTED = ("transformers.", "mmtune.backbones.")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def layouts_of(model: nn.Module, names: Iterable[str]) -> Layouts | None:
    """Where a model holds these parameters; None where they have no place that is known.

    A place is known where a module without parts of its own holds the parameter. What else holds
    it (tied weights) counts too.

    Raises:
        ValueError: a name that is no parameter's.
    """
    present = dict(model.named_parameters(remove_duplicate=False))
    wanted = list(names)
    if missing := next((name for name in wanted if name not in present), None):
        raise ValueError(f"{missing} is no parameter of this {type(model).__name__}")
    changing = {id(present[name]) for name in wanted}
    holders = [
        module
        for module in model.modules()
        if any(id(p) in changing for p in module._parameters.values())
    ]
    if not holders or any(True for holder in holders for _ in holder.children()):
        return None
    return Layouts(model, holders)


class Layouts:
    """The modules of a model as some of its parameters divide them."""

    def __init__(self, model: nn.Module, holders: Collection[nn.Module]) -> None:
        self._model, self._holders = model, holders
        self._modules = list(model.modules())
        self._known: dict[frozenset[int], Layout] = {}

    def hooked(self) -> frozenset[int]:
        """Numbers of the modules, holders left out, in whose forward something else has a say."""
        held = set(map(id, self._holders))
        return frozenset(i for i in hooked_among(self._modules) if id(self._modules[i]) not in held)

    def layout(self, hooked: frozenset[int]) -> Layout:
        """The division where these are hooked."""
        if hooked not in self._known:
            watched = [*self._holders, *(self._modules[i] for i in hooked)]
            self._known[hooked] = _layout(self._model, self._holders, watched)
        return self._known[hooked]


@dataclass(frozen=True)
class Layout:
    """How a pass is divided.

    Attributes:
        watched: the modules whose first call ends what can be kept.
        kept: those whose outputs can be, before that.
        earlier: number in `kept` -> that of the layer before it in one stack.
        opened: modules around the watched ones, whose code runs in every pass.
        owners: (holder, the module whose code calls it).
    """

    watched: tuple[nn.Module, ...]
    kept: tuple[nn.Module, ...]
    earlier: Mapping[int, int]
    opened: tuple[nn.Module, ...]
    owners: tuple[tuple[nn.Module, nn.Module], ...]


def _layout(
    model: nn.Module, holders: Collection[nn.Module], watched: Collection[nn.Module]
) -> Layout:
    parents = {id(child): module for module in model.modules() for child in module.children()}
    ends, around = set(map(id, watched)), set[int]()
    for module in watched:
        while (module := parents.get(id(module))) is not None:  # type: ignore[assignment]
            around.add(id(module))
    kept: dict[int, nn.Module] = {}
    opened: dict[int, nn.Module] = {}
    earlier: dict[int, int] = {}

    def divide(module: nn.Module) -> None:
        before = None
        for child in module.children():
            if id(child) in ends:
                before = None
            elif id(child) in around or _is_list(child):
                opened[id(child)] = child
                divide(child)
                before = None
            elif id(child) not in kept:
                if before is not None and isinstance(module, nn.ModuleList):
                    earlier[len(kept)] = before
                before = len(kept)
                kept[id(child)] = child

    opened[id(model)] = model
    if id(model) not in ends:
        divide(model)
    owners = []
    for holder in holders:
        owner = parents.get(id(holder))
        while owner is not None and _is_list(owner):
            owner = parents.get(id(owner))
        if owner is not None:
            owners.append((holder, owner))
    return Layout(
        tuple(watched), tuple(kept.values()), earlier, tuple(opened.values()), tuple(owners)
    )


def _is_list(module: nn.Module) -> bool:
    """Whether its parts are called by the module around it."""
    return type(module).forward is nn.Module.forward


def hooked_among(modules: Sequence[nn.Module]) -> list[int]:
    """Numbers of the modules in whose forward something other than families' own has a say."""
    # Asked of every module in every pass: hardly any has a hook at all.
    suspects = [
        i
        for i, has in enumerate(module.__dict__ for module in modules)
        if "forward" in has
        or has["_forward_hooks"]
        or has["_forward_pre_hooks"]
        or has["_backward_hooks"]
        or has["_backward_pre_hooks"]
    ]
    return [i for i in suspects if _is_hooked(modules[i])]


def _is_hooked(module: nn.Module) -> bool:
    has = module.__dict__
    if "forward" in has:
        return True
    hooks = [hook for name in HOOKS for hook in has[name].values()]
    return not all(_origin(hook).startswith(TRUSTED) for hook in hooks)


def _origin(hook: Any) -> str:
    """The name of the module that a hook comes from."""
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", None) or "")
