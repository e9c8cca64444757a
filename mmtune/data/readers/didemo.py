"""DiDeMo for paragraph retrieval: {"clip_name": name, "caption": text or list of texts} a line.

The released JSON list of {"video", "description"} is read too. All sentences about a video, in the
order of the file, are joined by spaces to the one paragraph that retrieval is about.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mmtune.data.options import SourceOptions
from mmtune.data.readers.blip import merged
from mmtune.data.readers.clips import clip_records
from mmtune.data.records import Problem, Record


def read(source: SourceOptions, role: str) -> Iterator[Record | Problem]:
    """Yield one record per video, with one paragraph."""
    for found in merged(clip_records(source)):
        if isinstance(found, Record):
            found = replace(found, captions=(" ".join(found.captions),))
        yield found
