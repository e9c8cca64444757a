"""The recipes of builds: which slots there are, in which order, and what fills them by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """One kind of data set.

    Attributes:
        name: in configs.
        summary: one line on what it makes.
        samples: slots that every sample goes through, in order -> what fills them by default.
        pool: likewise of what the pools of locality go through.
        settings: slot -> settings that differ from the defaults of what fills it by default.
    """

    name: str
    summary: str
    samples: Mapping[str, str]
    pool: Mapping[str, str]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def slots(self) -> dict[str, str]:
        """All slots -> what fills them by default."""
        return {**self.samples, **self.pool}


def recipes() -> dict[str, Recipe]:
    """The recipes by name."""
    from data_builders.eic import EIC
    from data_builders.evqa import EVQA

    return {recipe.name: recipe for recipe in (EVQA, EIC)}
