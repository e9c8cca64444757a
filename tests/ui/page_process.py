"""`mmtune ui` with a tiny model that writes, which the name tests:llava stands for."""

from __future__ import annotations

import sys

from mmtune import backbones
from mmtune.backbones.base import Loaded
from mmtune.cli import main
from tests.editing.tiny import SPEC, stock

WRITER = "tests:llava"


def writer():
    model, view, tokenizer = stock("llava")
    return Loaded(model, view, SPEC, lambda texts: {}, 64, WRITER, len, tokenizer)


if __name__ == "__main__":
    load = backbones.load
    backbones.load = lambda name, dtype="float32": writer() if name == WRITER else load(name, dtype)
    sys.exit(main(sys.argv[1:]))
