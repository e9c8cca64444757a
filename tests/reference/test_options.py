"""Options as a reader of configs needs them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from editing.ranges import Count, Share
from editing.regions import Region
from mmtune.reference.options import Option, options_of, type_text


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (int, "whole number"),
        (float | None, "number | null"),
        (bool, "true | false"),
        (Literal["a", "b"] | None, "a | b | null"),
        (
            list[str] | dict[str, list[int]],
            "list of text | mapping of text to list of whole number",
        ),
        (tuple[int, ...], "list of whole number"),
        (Count, "whole number >= 1"),
        (Share, "number > 0 and < 1"),
        (Annotated[int, Field(ge=2, le=5)], "whole number >= 2 and <= 5"),
        (list[Annotated[float, Field(gt=0)]], "list of number > 0"),
        (Region, "{branches, sites, layers, biases}"),
        (Any, "any"),
    ],
)
def test_types_in_words(hint, text):
    assert type_text(hint) == text


@dataclass
class Inner:
    """Inner.

    Attributes:
        rate: of it.
    """

    rate: float = 5e-4


@dataclass
class Outer:
    """Outer.

    Attributes:
        sites: roles.
        inner: what is inside.
    """

    path: str
    sites: list[str] = field(default_factory=lambda: ["q", "v"])
    inner: Inner = field(default_factory=Inner)
    empty: str = ""
    none: int | None = None


def test_defaults_are_as_yaml_has_them_and_sections_are_opened():
    assert list(options_of(Outer)) == [
        Option("path", "text", "required", ""),
        Option("sites", "list of text", '["q", "v"]', "roles."),
        Option("inner", "section", "", "what is inside."),
        Option("inner.rate", "number", "0.0005", "of it."),
        Option("empty", "text", '""', ""),
        Option("none", "whole number | null", "null", ""),
    ]
