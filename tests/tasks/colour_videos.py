"""Eight small videos of moving discs with their captions, and questions about them."""

from __future__ import annotations

import json

from mmtune.data import DataOptions, SourceOptions
from tests.data.clips import moving_disc, write_video
from tests.tasks.tiny import COLOURS, SHADES


def colour_videos(folder, on_error="raise"):
    """Videos of a light or dark disc in each of four colours, as train and test."""
    lines = []
    for colour, rgb in COLOURS.items():
        for shade, factor in SHADES.items():
            name = f"{shade}-{colour}"
            disc = tuple(int(c * factor) for c in rgb)
            write_video(folder / f"{name}.mp4", moving_disc(disc))
            own = [f"a {shade} {colour} disc", f"{colour} and {shade}"]
            lines += [json.dumps({"clip_name": name, "caption": c}) for c in own]
    path = folder / "clips.jsonl"
    path.write_text("\n".join(lines))
    source = SourceOptions("msrvtt", str(path))
    return DataOptions(train=source, test=source, on_error=on_error)


def colour_questions(folder, on_error="raise"):
    """Two questions about each of twelve videos in which one disc follows another."""
    lines = []
    for first, rgb in COLOURS.items():
        for second, other in COLOURS.items():
            if first == second:
                continue
            name = f"{first}-{second}"
            write_video(folder / f"{name}.mp4", moving_disc(rgb, 4) + moving_disc(other, 4))
            red = "yes" if "red" in (first, second) else "no"
            asked = [("what colour is it", first, "what"), ("is it red", red, "yes/no")]
            lines += [
                json.dumps({"video_id": name, "question": q, "answer": a, "answer_type": kind})
                for q, a, kind in asked
            ]
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines))
    source = SourceOptions("video_qa", str(path))
    return DataOptions(train=source, val=source, test=source, on_error=on_error)
