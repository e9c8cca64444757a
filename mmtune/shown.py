"""What a command that brings its own module shows; `cli.py` prints it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Findings:
    """What a command prints, tables and then lines, and its exit code.

    Attributes:
        tables, lines: in order.
        code: of the command's exit.
        wide: tables get more room where output has no width of its own.
        errors: lines for the error stream.
        then: what goes on after all of it was printed, such as a server.
    """

    tables: list[Table]
    lines: list[str]
    code: int = 0
    wide: bool = False
    errors: list[str] = field(default_factory=list)
    then: Callable[[], object] | None = None
