"""Templates of prompts: texts with fields in braces."""

from __future__ import annotations

import string


def placeholders(template: str) -> set[str]:
    """Names of the fields of a template; {""} where it is none."""
    try:
        return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError:
        return {""}
