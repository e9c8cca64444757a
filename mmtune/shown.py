"""What a command that brings its own module shows; `cli.py` prints it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Findings:
    """What a command prints, tables and then lines, and its exit code."""

    tables: list[Table]
    lines: list[str]
    code: int = 0
