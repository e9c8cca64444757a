"""MSR-VTT as ALPRO and BLIP annotate it: {"clip_name": "video7010", "caption": text} a line.

A JSON list of such mappings is read too, and `video` or `video_id` in place of `clip_name`. Videos
lie under `images` as `video7010.mp4`, or as folders of frames. The usual test split is the 1k one
(1,000 clips with one caption each); a split is a file here.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmtune.data.options import SourceOptions
from mmtune.data.readers.blip import merged
from mmtune.data.readers.clips import clip_records
from mmtune.data.records import Problem, Record


def read(source: SourceOptions, role: str) -> Iterator[Record | Problem]:
    """Yield one record per clip, with all of its captions."""
    return iter(merged(clip_records(source)))
