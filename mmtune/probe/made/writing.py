"""The built-in set as files."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from mmtune.probe.items import ItemSet, read_items, write_items
from mmtune.probe.made.canvas import Made
from mmtune.probe.made.figures import charts, geometry
from mmtune.probe.made.objects import consistency, naming, presence
from mmtune.probe.made.spatial import relations
from mmtune.probe.made.texts import strings
from mmtune.runs import write_text

MAKERS: dict[str, Callable[[random.Random, int], Made]] = {
    "relations": relations,
    "strings": strings,
    "charts": charts,
    "geometry": geometry,
    "presence": presence,
    "naming": naming,
    "consistency": consistency,
}
NOTE = "made by a script (seed {seed}): drawn figures, set texts and public-domain drawings"


def write(out: Path, each: int, seed: int) -> ItemSet:
    """Write items.jsonl, note.txt and images/ into a folder.

    Args:
        out: the folder.
        each: questions of each maker, those that belong together counted as one.
        seed: of everything that is drawn.

    Raises:
        ValueError: each is less than 1.
    """
    if each < 1:
        raise ValueError(f"each must be 1 or more, got {each}")
    (out / "images").mkdir(parents=True, exist_ok=True)
    items = []
    for name, make in MAKERS.items():
        made = make(random.Random(f"{seed} {name}"), each)
        for path, picture in made.pictures.items():
            partial = out / f"{path}.partial"
            picture.save(partial, format="PNG")
            partial.replace(out / path)
        items += made.items
    write_text(out / "note.txt", NOTE.format(seed=seed) + "\n")
    write_items(out / "items.jsonl", items)
    return read_items(out / "items.jsonl")
