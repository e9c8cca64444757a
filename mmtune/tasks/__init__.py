"""Objectives: one file each, found by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmtune.tasks.base import Task


def tasks() -> dict[str, type[Task]]:
    """Every task class by name."""
    from mmtune.tasks.retrieval import RetrievalTask

    return {cls.name: cls for cls in (RetrievalTask,)}
