"""Where samples come from: one file a format, each with a `Source` that reads it.

`base` is the contract, `checks` what all of them look at. `coco`, `vqav2`, `okvqa`, `nq`, `folder`
and `easyedit` read files that people have; `clipart` and `facts` hold what ships with the project.
`openclipart` and `openclipart_words` are no sources of a build: with them the zoo's own drawings
were read from the raw collection (`data_builders.clipart`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_builders.sources.base import Source

FORMATS = {
    "vqav2": "VQAv2",
    "coco": "Coco",
    "okvqa": "OkVqa",
    "nq": "NaturalQuestions",
    "folder": "Folder",
    "easyedit": "EasyEdit",
    "clipart": "Clipart",
    "facts": "Facts",
}  # the module, which is what configs call the format -> its class


def sources() -> dict[str, type[Source[Any]]]:
    """The sources by their `format` in configs."""
    return {
        name: getattr(import_module(f"data_builders.sources.{name}"), own)
        for name, own in FORMATS.items()
    }
