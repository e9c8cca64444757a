"""Image-text data: readers of the formats that people have, one schema inside."""

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
    Record,
    TarMember,
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
    "Record",
    "SourceOptions",
    "TarMember",
    "check",
    "load_data",
]
