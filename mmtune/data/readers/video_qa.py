"""Video question answering, MSRVTT-QA: {"question", "answer", "video_id", "answer_type"?} a line.

A JSON list of such mappings is read too (the released one numbers its videos: 6513 is video6513).
Videos lie under `images`. A question without an answer is kept: a task says what it does with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmtune.data.options import SourceOptions
from mmtune.data.readers.clips import NAMES, Clips, entries
from mmtune.data.records import Problem, Question

IDS = ("question_id", "id")


def read(source: SourceOptions, role: str) -> Iterator[Question | Problem]:
    """Yield one question per mapping; without an id of its own it is numbered from 0."""
    clips = Clips(source)
    for number, (where, item) in enumerate(entries(str(source.path), "question, answer, video_id")):
        yield item if isinstance(item, Problem) else _question(item, clips, where, number)


def _question(item: dict[str, Any], clips: Clips, where: str, number: int) -> Question | Problem:
    video = clips.video(item, where)
    if isinstance(video, Problem):
        return video
    question = item.get("question")
    if not isinstance(question, str) or not question.strip():
        return Problem(where, "malformed record", f"question is {question!r:.60}, expected text")
    answers = item.get("answer")
    answers = [answers] if isinstance(answers, str) else answers or []
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        expected = f"answer is {answers!r:.60}, expected a text or a list of texts"
        return Problem(where, "malformed record", expected)
    rest = {k: v for k, v in item.items() if k not in ("question", "answer", *NAMES)}
    identity = next((item[k] for k in IDS if item.get(k) is not None), number)
    given = tuple(a.strip() for a in answers if a.strip())
    return Question(video, question.strip(), given, str(identity), where, rest)
