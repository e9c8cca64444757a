"""What is known of a method or an editor, gathered from registry, docstrings and conformance."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmtune.reference.docstrings import Block, parse
from mmtune.reference.options import Option, options_of

if TYPE_CHECKING:
    from editing.methods.base import Editor
    from mmtune.conformance.methods import MethodCase
    from mmtune.tuners.registry import Method


@dataclass(frozen=True)
class Tried:
    """One row of the conformance suite.

    Attributes:
        settings: that differ from the defaults.
        works: backbones on which everything is asserted; "all" for all there are, empty for none.
        refuses: (backbone, part of the sentence) where it is refused.
        merges: whether the adapter folds into the stock weights.
        starts: whether a fresh adapter changes nothing.
    """

    settings: str
    works: str
    refuses: Sequence[tuple[str, str]]
    merges: str
    starts: str


@dataclass(frozen=True)
class Page:
    """A method or an editor.

    Attributes:
        name: in configs.
        kind: "method" or "editor".
        summary: one line.
        body: how it works, with its equations.
        count: trainable parameters, or what an edit changes.
        source: paper and identifier, and then what the docstrings say of the source.
        options: see `Option`.
        tried: rows of the conformance suite; none for editors.
        notes: further sentences.
        configs: names of those that ship for it.
    """

    name: str
    kind: str
    summary: str
    body: Sequence[Block]
    count: str
    source: Sequence[str]
    options: Sequence[Option]
    tried: Sequence[Tried]
    notes: Sequence[str]
    configs: Sequence[str]


def method_page(method: Method) -> Page:
    """The page of a fine-tuning method."""
    owner = documented(method)
    docs, built = parse(owner.__doc__), parse(inspect.getdoc(method.build))
    tried = _tried(method.name)
    return Page(
        name=method.name,
        kind="method",
        summary=method.summary,
        body=[Block(docs.summary), *docs.body],
        count=docs.count,
        source=[method.source, *filter(None, (docs.source, built.source))],
        options=list(options_of(method.options, owner)),
        tried=tried,
        notes=[_merging(tried)],
        configs=configs_with("method", method.name),
    )


def editor_page(cls: type[Editor]) -> Page:
    """The page of an editor."""
    from editing.meta.base import TrainedEditor

    own, around = parse(cls.__doc__), parse(inspect.getmodule(cls).__doc__)
    trained = issubclass(cls, TrainedEditor)
    return Page(
        name=cls.name,
        kind="editor",
        summary=cls.summary,
        body=[Block(around.summary), *around.body, Block(own.summary), *own.body],
        count=own.count,
        source=[cls.source, *filter(None, (around.source, own.source))],
        options=list(options_of(cls.options)),
        tried=(),
        notes=["Trained before it edits: `mmtune edit-train`."] if trained else [],
        configs=configs_with("editor", cls.name),
    )


def documented(method: Method) -> type:
    """The class whose docstring speaks of a method: its options, or the config they come from."""
    from mmtune.tuners.registry import modules

    options = method.options
    if not (options.__doc__ or "").startswith(f"{options.__name__}("):  # dataclass's own text
        return options
    for module in modules():
        for config, _ in getattr(module, "PEFT_METHODS", {}).values():
            if config.__name__.replace("Config", "Options") == options.__name__:
                return config
    return options


def configs_with(key: str, name: str) -> list[str]:
    """Shipped configs in which some `key` is `name`, such as method: aurora."""
    from mmtune.config import config_names
    from mmtune.yaml_source import read_yaml

    files = config_names().items()
    return [config for config, path in files if _has(read_yaml(path).values, key, name)]


def _has(value: Any, key: str, name: str) -> bool:
    if isinstance(value, dict):
        own = value.get(key)
        named = own == name or (isinstance(own, dict) and own.get("name") == name)
        return named or any(_has(part, key, name) for part in value.values())
    return isinstance(value, list) and any(_has(part, key, name) for part in value)


def _tried(name: str) -> list[Tried]:
    from mmtune.conformance.backbones import BACKBONES
    from mmtune.conformance.methods import METHODS

    found = []
    for case in METHODS.values():
        if case.method == name:
            works = [b for b in case.backbones if b not in case.refused]
            settings = ", ".join(f"{key}: {value}" for key, value in case.settings.items())
            found.append(
                Tried(
                    settings=settings.replace("'", "") or "defaults",
                    works="all" if len(works) == len(BACKBONES) else ", ".join(works),
                    refuses=list(case.refused.items()),
                    merges=_merges(case, works) if works else "",
                    starts=("yes" if case.starts_at_base else "no") if works else "",
                )
            )
    return found


def _merges(case: MethodCase, works: Sequence[str]) -> str:
    there = [b for b in works if case.merges_on(b)]
    if len(there) == len(works):
        return "yes"
    without = ", ".join(b for b in works if b not in there)
    return f"yes, but not on {without}" if there else "no"


def _merging(tried: Sequence[Tried]) -> str:
    answers = {row.merges for row in tried if row.merges}
    if answers == {"yes"}:
        return "Merges: the trained adapter folds into the stock weights (`mmtune merge`)."
    if answers == {"no"}:
        return "Merges: never; no stock weight can hold what it trains."
    return "Merges: with some settings and backbones, as the table says."
