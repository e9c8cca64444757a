"""What the formats of video data share: lines or lists of mappings, and videos by clip name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmtune.data.options import SourceOptions
from mmtune.data.readers.json_files import image_root, json_lines, load_json, wrong_shape
from mmtune.data.records import Problem, Record, VideoFile, captions_of

ENDINGS = (".mp4", ".avi", ".webm", ".mkv", ".mov")
NAMES = ("clip_name", "video", "video_id")
CAPTIONS = ("caption", "captions", "description", "sentence")


def entries(path: str, what: str) -> Iterator[tuple[str, Any]]:
    """Every mapping of a file of JSON lines, or of one JSON list, as (where, mapping or Problem).

    Args:
        path: a file; one that ends in .json is a list, any other has a mapping a line.
        what: the format's fields, for messages.

    Raises:
        DataError: missing, or not what it says.
    """
    if path.endswith(".json"):
        document = load_json(path)
        if not isinstance(document, list):
            raise wrong_shape(path, f"a list of mappings ({what})", document)
        found = ((f"{path}, record {i}", item) for i, item in enumerate(document))
    else:
        found = json_lines(path)
    for where, item in found:
        if isinstance(item, dict | Problem):
            yield where, item
        else:
            yield where, Problem(where, "malformed record", f"expected a mapping, got {item!r:.60}")


class Clips:
    """Finds the video that a clip's name means below the folder of a source.

    The name as it is, with one of the usual endings, or with one in place of its own (DiDeMo names
    the files that were uploaded, and is passed on converted); or a folder of extracted frames.
    """

    def __init__(self, source: SourceOptions) -> None:
        self.root = image_root(source.images, str(source.path))
        self.known: dict[str, VideoFile] = {}

    def video(self, item: dict[str, Any], where: str) -> VideoFile | Problem:
        """The video of one mapping, whether or not it exists; what is wrong otherwise."""
        field = next((name for name in NAMES if name in item), NAMES[0])
        name = item.get(field)
        if isinstance(name, int) and not isinstance(name, bool):
            name = f"video{name}"  # as MSR-VTT numbers its clips
        if not isinstance(name, str) or not name:
            expected = f"{field} is {name!r:.60}, expected the name of a clip"
            return Problem(where, "malformed record", expected)
        if name not in self.known:
            self.known[name] = VideoFile(self.root, self._found(name))
        return self.known[name]

    def _found(self, name: str) -> str:
        stem, ending = os.path.splitext(name)
        has_ending = ending.lower() in ENDINGS
        names = [name] if has_ending else []
        names += [name + e for e in ENDINGS]
        names += [stem + e for e in ENDINGS] if has_ending else []
        names += [name, stem]  # folders of frames
        there = (n for n in names if os.path.exists(os.path.join(self.root, n)))
        return next(there, names[0])


def clip_records(source: SourceOptions) -> Iterator[Record | Problem]:
    """One record per mapping with a clip and a caption or list of captions."""
    clips = Clips(source)
    for where, item in entries(str(source.path), "clip_name, caption"):
        yield item if isinstance(item, Problem) else _record(item, clips, where)


def _record(item: dict[str, Any], clips: Clips, where: str) -> Record | Problem:
    video = clips.video(item, where)
    if isinstance(video, Problem):
        return video
    captions = captions_of(next((item[k] for k in CAPTIONS if k in item), None), where)
    if isinstance(captions, Problem):
        return captions
    rest = {k: v for k, v in item.items() if k not in (*NAMES, *CAPTIONS)}
    return Record(video, captions, Path(video.name).stem, where, rest)
