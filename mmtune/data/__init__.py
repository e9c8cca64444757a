"""Images and videos with texts: readers of the formats that people have, one schema inside."""

from __future__ import annotations

from mmtune.data.checking import Checked, check, load_data
from mmtune.data.options import DataOptions, SourceOptions
from mmtune.data.records import (
    DataError,
    DatasetCell,
    ImageBytes,
    ImageFile,
    ImageProblem,
    Problem,
    Question,
    Record,
    TarMember,
    VideoFile,
)

__all__ = [
    "Checked",
    "DataError",
    "DataOptions",
    "DatasetCell",
    "ImageBytes",
    "ImageFile",
    "ImageProblem",
    "Problem",
    "Question",
    "Record",
    "SourceOptions",
    "TarMember",
    "VideoFile",
    "check",
    "load_data",
]
