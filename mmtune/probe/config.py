"""The configs of `mmtune probe`: dataclasses <- YAML <- dotted overrides; all mistakes at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from editing.config import EditModelOptions
from editing.ranges import Count, Seed
from mmtune.config import check_name, checked, name_of, reading, section
from mmtune.probe.http_client import HttpOptions
from mmtune.probe.styles import STYLES, StyleOptions
from mmtune.yaml_source import YamlSource, as_yaml, listed, plain

SECTIONS = ("name", "seed", "items", "models", "styles", "asking")


@dataclass(frozen=True)
class ItemOptions:
    """The questions.

    Attributes:
        format: "made" makes the built-in set; "jsonl" is this toolkit's own layout; "pope", "mme"
            and "tsv" (VLMEvalKit's) are read as they are published.
        path: the file; of MME the folder.
        images: folder of images; None means the file's.
        each: questions of each kind of the built-in set.
        limit: only the first items of each category.
    """

    format: Literal["made", "jsonl", "pope", "mme", "tsv"] = "made"
    path: str | None = None
    images: str | None = None
    each: Count = 12
    limit: Count | None = None

    def __post_init__(self) -> None:
        if (self.path is None) != (self.format == "made"):
            raise ValueError(f"path must be given for every format but made, got {self.path!r}")


@dataclass(frozen=True)
class LocalOptions:
    """A model of this toolkit, as it is or with what was done to it.

    Attributes:
        model: which one.
        adapter: a fine-tune's adapter folder or run, merged into it.
        edit: folder of an edit that is applied while it is asked.
        batch: requests at once.
    """

    model: EditModelOptions
    adapter: str | None = None
    edit: str | None = None
    batch: Count = 8


@dataclass(frozen=True)
class ReplayOptions:
    """Replies of an earlier probe.

    Attributes:
        path: its replies.jsonl.
        client: whose; None where the file holds one alone.
    """

    path: str
    client: str | None = None


CLIENTS: dict[str, type] = {"local": LocalOptions, "http": HttpOptions, "replay": ReplayOptions}


@dataclass(frozen=True)
class ProbeConfig:
    """A comparison of models, fully resolved.

    Attributes:
        name: names the run folder.
        seed: of the built-in set and of what styles draw.
        items: see `ItemOptions`.
        models: name of a column -> its client's options. Each is compared with the first one.
        styles: names of `STYLES`.
        asking: see `StyleOptions`; its seed is that of the config.
        source: the file that it was read from.
    """

    name: str
    seed: int
    items: ItemOptions
    models: Mapping[str, Any]
    styles: tuple[str, ...]
    asking: StyleOptions
    source: str = field(default="", compare=False)


def load_probe_config(name: str | os.PathLike[str], overrides: Iterable[str] = ()) -> ProbeConfig:
    """Read the config of `mmtune probe`.

    Args:
        name: a YAML file, or the name of a shipped config.
        overrides: `dotted.key=value` items, such as "items.each=4".

    Raises:
        ConfigError: with every mistake there is, not only the first.
    """
    with reading(name, overrides) as source:
        raw = source.values
        run_name = name_of(source, SECTIONS)
        seed = checked(source, ("seed",), Seed, raw.get("seed", 0))
        asking = raw.get("asking") or {}
        return ProbeConfig(
            name=run_name,
            seed=seed,
            items=section(source, "items", ItemOptions),
            models=_models(source),
            styles=_styles(source),
            asking=checked(source, ("asking",), StyleOptions, {**asking, "seed": seed or 0}),
            source=source.path,
        )


def to_yaml(config: ProbeConfig) -> str:
    """The resolved config as YAML that `load_probe_config` reads back to an equal config."""
    kinds = {cls: kind for kind, cls in CLIENTS.items()}
    asking = {key: value for key, value in plain(config.asking).items() if key != "seed"}
    document = {
        "name": config.name,
        "seed": config.seed,
        "items": plain(config.items),
        "models": {
            name: {"client": kinds[type(options)], **plain(options)}
            for name, options in config.models.items()
        },
        "styles": list(config.styles),
        "asking": asking,
    }
    return as_yaml(document)


def _styles(source: YamlSource) -> tuple[str, ...]:
    raw = source.values.get("styles", list(STYLES))
    if not isinstance(raw, list) or not raw or len(set(map(str, raw))) < len(raw):
        source.add(("styles",), f"expected a list of {listed(STYLES)}, each once, got {raw!r}")
        return ()
    for number, style in enumerate(raw):
        if style not in STYLES:
            source.add(("styles", number), f"no style {style!r}; there are {listed(STYLES)}")
    return tuple(raw)


def _models(source: YamlSource) -> dict[str, Any]:
    raw = source.values.get("models")
    if not isinstance(raw, dict) or not raw:
        text = "expected a mapping such as mine: {client: local, model: {name: zoo:tiny-llava}}"
        source.add(("models",), f"{text}, got {raw!r}")
        return {}
    found = {}
    for name, own in raw.items():
        at = ("models", name)
        check_name(source, at, name)
        kind = own.get("client", "local") if isinstance(own, dict) else None
        if kind not in CLIENTS:
            source.add((*at, "client"), f"expected one of {listed(CLIENTS)}, got {kind!r}")
            continue
        settings = {key: value for key, value in own.items() if key != "client"}
        found[name] = checked(source, at, CLIENTS[kind], settings, ("client",))
    return found
