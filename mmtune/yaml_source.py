"""A YAML file as values with their lines and command-line overrides; what is wrong is collected."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Mistake:
    """One thing wrong with a config: where (file and line), which key, and what to do."""

    where: str
    key: str
    text: str

    def __str__(self) -> str:
        return (
            f"{self.where}: {self.key}: {self.text}" if self.key else f"{self.where}: {self.text}"
        )


class ConfigError(ValueError):
    """A config that cannot be used; `mistakes` holds everything that is wrong with it."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        self.mistakes = list(mistakes)
        count = len(self.mistakes)
        head = f"{count} mistake{'s' if count != 1 else ''} in the config:"
        super().__init__("\n".join([head, *(f"  {m}" for m in self.mistakes)]))


class _Loader(yaml.SafeLoader):
    """YAML's safe loader that reads 1e-4 as a number (YAML 1.1 wants 1.0e-4) and off as a word."""


_OURS = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in _OURS]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d[\d_]*(?:[eE][-+]?\d+)?"
        r"|\d[\d_]*[eE][-+]?\d+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


@dataclass
class YamlSource:
    """The raw values of a config, and where each came from."""

    path: str
    values: dict[str, Any]
    lines: dict[Key, int]
    overridden: dict[Key, str] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)

    def where(self, key: Key) -> str:
        """The override, or the file and line, that gave `key` or the nearest key above it."""
        for end in range(len(key), 0, -1):
            if key[:end] in self.overridden:
                return f"command line ({self.overridden[key[:end]]})"
        for end in range(len(key), 0, -1):
            if key[:end] in self.lines:
                return f"{self.path}:{self.lines[key[:end]]}"
        return self.path

    def add(self, key: Key, text: str) -> None:
        """Note a mistake at `key`."""
        self.mistakes.append(Mistake(self.where(key), dotted_key(key), text))


def read_yaml(path: Path) -> YamlSource:
    """One YAML mapping with the line of each key; ConfigError where it is not one."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
        if node is None or not isinstance(node, yaml.MappingNode):
            raise ConfigError([Mistake(str(path), "", "expected a mapping of keys to values")])
        lines: dict[Key, int] = {}
        repeated = list(_walk(node, (), lines))
        loader = _Loader("")
        try:
            values = loader.construct_document(node)
        finally:
            loader.dispose()
    except UnicodeDecodeError as error:
        raise ConfigError([Mistake(str(path), "", f"not UTF-8 text: {error}")]) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        text = f"not valid YAML: {getattr(error, 'problem', None) or error}"
        raise ConfigError([Mistake(where, "", text)]) from error
    source = YamlSource(str(path), values, lines)
    for key, first, second in repeated:
        where = f"{path}:{second}"
        text = f"given twice (first on line {first}); keep one"
        source.mistakes.append(Mistake(where, dotted_key(key), text))
    return source


def _walk(node: yaml.Node, at: Key, lines: dict[Key, int]) -> Iterable[tuple[Key, int, int]]:
    """Record the line of each key below `node`; yield (key, first line, line) of repeated ones."""
    if isinstance(node, yaml.MappingNode):
        for key_node, value in node.value:
            key = (*at, key_node.value)
            line = key_node.start_mark.line + 1
            if key in lines:
                yield key, lines[key], line
            lines.setdefault(key, line)
            yield from _walk(value, key, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*at, index)] = value.start_mark.line + 1
            yield from _walk(value, (*at, index), lines)


def override(source: YamlSource, item: str) -> None:
    """Set one `dotted.key=value` in the raw values."""
    dotted, equals, text = item.partition("=")
    parts = dotted.split(".")
    if not equals or not all(parts):
        where = f"command line ({item})"
        source.mistakes.append(
            Mistake(where, "", "expected dotted.key=value, such as training.lr=1e-3")
        )
        return
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        value = text
    target: Any = source.values
    for end, part in enumerate(parts[:-1], start=1):
        if target.get(part) is None:
            target[part] = {}
        if not isinstance(target[part], dict):
            key = tuple(parts[:end])
            text = f"holds {target[part]!r}, so it has no key {parts[end]!r}"
            source.mistakes.append(Mistake(f"command line ({item})", dotted_key(key), text))
            return
        target = target[part]
    target[parts[-1]] = value
    source.overridden[tuple(parts)] = item


def as_yaml(document: Any) -> str:
    """A document as YAML that reads back equal; keys keep their order."""
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    # PyYAML writes this line break as it is, and reads it back as a blank; escaped, it stays.
    return yaml.safe_dump(document, sort_keys=False) if "\x85" in text else text


def plain(value: Any) -> Any:
    """Dataclasses, tuples and paths as what YAML can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def listed(names: Iterable[str]) -> str:
    """Names for a message."""
    return ", ".join(names)


def dotted_key(key: Key) -> str:
    """A key path as it is written on the command line."""
    return ".".join(str(part) for part in key)
