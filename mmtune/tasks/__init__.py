"""Objectives: one file each, found by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmtune.tasks.base import Task


def tasks() -> dict[str, type[Task]]:
    """Every task class by name."""
    from mmtune.tasks.blip_retrieval import BlipRetrievalTask
    from mmtune.tasks.captioning import CaptioningTask
    from mmtune.tasks.retrieval import RetrievalTask
    from mmtune.tasks.video_qa import VideoQaTask
    from mmtune.tasks.video_retrieval import BlipVideoRetrievalTask, VideoRetrievalTask
    from mmtune.tasks.vqa import VqaTask

    found: tuple[type[Task], ...] = (
        RetrievalTask,
        BlipRetrievalTask,
        VqaTask,
        CaptioningTask,
        VideoRetrievalTask,
        BlipVideoRetrievalTask,
        VideoQaTask,
    )
    return {cls.name: cls for cls in found}
