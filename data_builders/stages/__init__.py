"""The stages of a build, one file each."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_builders.stages.base import Stage

MODULES = ("select", "rephrase", "imagine", "filter", "locality")


def stages() -> dict[str, dict[str, type[Stage[Any]]]]:
    """Slot -> the stages that fit there, by name; the first is the default.

    Each module of `MODULES` lists its own in `STAGES`.
    """
    found: dict[str, dict[str, type[Stage[Any]]]] = {}
    for module in MODULES:
        for one in import_module(f"data_builders.stages.{module}").STAGES:
            found.setdefault(one.slot, {})[one.name] = one
    return found
