"""The options of a method or editor: name, type, default, and what the docstring says."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mmtune.reference.docstrings import option_texts
from mmtune.yaml_source import plain

BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
WORDS = {type(None): "null", Any: "any", str: "text", bool: "true | false"}


@dataclass(frozen=True)
class Option:
    """One option, as a config has it.

    Attributes:
        name: its dotted key.
        type: what it may be.
        default: as YAML has it; empty where a section has options of its own.
        text: what it is.
    """

    name: str
    type: str
    default: str
    text: str


def options_of(cls: type, documented: type | None = None, at: str = "") -> Iterator[Option]:
    """Every option of a dataclass, those of the dataclasses in it included.

    Args:
        cls: whose fields are the options.
        documented: whose docstrings speak of them; None means `cls`.
        at: what their names begin with.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    texts = option_texts(documented or cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], f"{at}{field.name}"
        text = texts.get(field.name, "")
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield Option(name, "section", "", text)
            yield from options_of(hint, at=f"{name}.")
        else:
            yield Option(name, type_text(hint), _default(field), text)


def type_text(hint: Any) -> str:
    """A type as a reader of configs needs it, such as "whole number >= 1 | null"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in WORDS:
        return WORDS[hint]
    if origin is typing.Annotated:
        bounds = " and ".join(filter(None, map(_bounds, hint.__metadata__)))
        return f"{type_text(arguments[0])} {bounds}".strip()
    if origin is Literal:
        return " | ".join("null" if value is None else str(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(type_text, arguments))
    if origin in (list, tuple):
        inner = dict.fromkeys(type_text(a) for a in arguments if a is not Ellipsis)
        return f"list of {' or '.join(inner)}"
    if origin is dict:
        return f"mapping of {type_text(arguments[0])} to {type_text(arguments[1])}"
    return {int: "whole number", float: "number"}.get(hint) or _named(hint)


def _named(hint: Any) -> str:
    if dataclasses.is_dataclass(hint):
        return f"{{{', '.join(field.name for field in dataclasses.fields(hint))}}}"
    return getattr(hint, "__name__", str(hint))


def _bounds(metadata: Any) -> str:
    """The range that pydantic's Field, or an annotated type, gives a number."""
    parts = [metadata, *getattr(metadata, "metadata", ())]
    found = [
        f"{sign} {getattr(part, name):g}"
        for part in parts
        for name, sign in BOUNDS.items()
        if getattr(part, name, None) is not None
    ]
    return " and ".join(found)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        return "required"
    value = plain(value)
    if isinstance(value, str):
        return value or '""'
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
