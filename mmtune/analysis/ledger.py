"""Results that take long, kept as they come, so that an interrupted analysis goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmtune.runs import write_text


class Ledger:
    """A file of JSON lines, {"of": what was computed, "found": the result}.

    A line that a stopped process left unfinished is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if "".join(lines) != text:
            write_text(path, "".join(lines))
        entries = [json.loads(line) for line in lines]
        self._known = {_key(entry["of"]): entry["found"] for entry in entries}

    def find(self, of: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `of`: the one on file, or else what `compute` returns, put on file."""
        key = _key(of)
        if key not in self._known:
            found = compute()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"of": of, "found": found}) + "\n")
            self._known[key] = found
        return self._known[key]


def _key(of: Mapping[str, Any]) -> str:
    return json.dumps(of, sort_keys=True)
