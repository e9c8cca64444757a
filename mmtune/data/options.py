"""The `data:` section of a run config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field

Format = Literal[
    "zoo",
    "karpathy",
    "blip",
    "flickr30k",
    "folder",
    "parquet",
    "webdataset",
    "datasets",
    "vqav2",
    "blip_vqa",
    "msrvtt",
    "didemo",
    "video_qa",
    "synthetic",
]
OnError = Literal["raise", "skip"]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class SourceOptions:
    """Where the records of one split are.

    Attributes:
        format: name of the reader; `mmtune.data.readers` has a file for each.
        path: file, folder, shard pattern or `datasets` repository (not used by zoo).
        images: folder that image (or video) paths are relative to and may not leave; None means the
            folder of the file that names them.
        answers: file of the answers, where they stand apart from the questions (vqav2).
        split: which part of the source; None means the one that fits the role (train, val, test)
            where the format has splits, and everything where it has none.
        name: name of the shipped data set (zoo only), or of the `datasets` configuration; what is
            made up (synthetic only).
        limit: read only the first records.
        restval: Karpathy splits only: images of "restval" belong to "train".
    """

    format: Format
    path: str | None = None
    images: str | None = None
    answers: str | None = None
    split: str | None = None
    name: str | None = None
    limit: Count | None = None
    restval: bool = True

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            known = ", ".join(get_args(Format))
            raise ValueError(f"no data format {self.format!r}; there are {known}")
        if self.format == "zoo" and not self.name:
            raise ValueError("format: zoo needs `name`, such as name: clipart-animals")
        if self.format not in ("zoo", "synthetic") and not self.path:
            raise ValueError(f"format: {self.format} needs `path`")


@dataclass(frozen=True)
class DataOptions:
    """The data of a run.

    Attributes:
        train, val, test: a source each; None where the run does not use it.
        on_error: what happens to bad records: "raise" stops before training and lists them, "skip"
            leaves them out and says how many. A file that cannot be read at all always stops.
    """

    train: SourceOptions | None = None
    val: SourceOptions | None = None
    test: SourceOptions | None = None
    on_error: OnError = "raise"
