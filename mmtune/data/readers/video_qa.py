"""Video question answering, MSRVTT-QA: {"question", "answer", "video_id", "answer_type"?} a line.

A JSON list of such mappings is read too (the released one numbers its videos: 6513 is video6513).
Videos lie under `images`. A test file may leave `answer` out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmtune.data.options import SourceOptions
from mmtune.data.readers.clips import NAMES, Clips, entries
from mmtune.data.readers.json_files import question_record
from mmtune.data.records import Problem, Question


def read(source: SourceOptions, role: str) -> Iterator[Question | Problem]:
    """Yield one question per mapping; without an id of its own it is numbered from 0."""
    clips = Clips(source)
    for number, (where, item) in enumerate(entries(str(source.path), "question, answer, video_id")):
        yield item if isinstance(item, Problem) else _question(item, clips, where, number, role)


def _question(
    item: dict[str, Any], clips: Clips, where: str, number: int, role: str
) -> Question | Problem:
    video = clips.video(item, where)
    if isinstance(video, Problem):
        return video
    return question_record(item, video, where, number, role, NAMES)
