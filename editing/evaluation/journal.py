"""A file of JSON lines that survives a process killed at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmtune.runs import write_text

Line = dict[str, Any]


class Journal:
    """Lines that are on disk once `add` returns.

    Attributes:
        path: of the file.
        lines: what it holds; the rest of a line that a killed process began is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[Line] = []
        if path.exists():
            data = path.read_bytes()
            whole = data.rpartition(b"\n")[0]
            self.lines = [json.loads(line) for line in whole.splitlines()]
            if len(whole) + bool(whole) != len(data):
                os.truncate(path, len(whole) + bool(whole))

    def add(self, line: Mapping[str, Any]) -> None:
        """Write a line, and wait until it is on disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(line) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(json.loads(text))

    def keep(self, count: int) -> None:
        """Leave out all lines but the first `count`; as `retain`, whole or not at all."""
        self._replace(self.lines[:count])

    def retain(self, wanted: Callable[[Line], bool]) -> None:
        """Leave out all lines but those that are wanted.

        A process killed meanwhile leaves the file as it was.
        """
        self._replace([line for line in self.lines if wanted(line)])

    def _replace(self, lines: list[Line]) -> None:
        if len(lines) < len(self.lines):
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
            self.lines = lines


def in_words(error: Exception) -> str:
    """An exception as one line of a journal: its kind, and the first lines of what it says."""
    return f"{type(error).__name__}: {error}"[:2000]
