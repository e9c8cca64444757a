"""The configs of `mmtune edit`: dataclasses <- YAML <- dotted overrides; all mistakes at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from editing.metrics.definitions import Compat
from editing.ranges import Count, Seed
from mmtune.config import check_name, checked, name_of, reading, section
from mmtune.data.options import OnError
from mmtune.suggestions import did_you_mean
from mmtune.yaml_source import YamlSource, as_yaml, listed, plain

SECTIONS = ("name", "seed", "model", "data", "protocol", "editors")
UNEDITED = "unedited"  # the row of the model as it is
COUNTS = (1, 10, 100)


@dataclass(frozen=True)
class EditModelOptions:
    """The model that is edited.

    Attributes:
        name: for `mmtune.backbones.load`, such as hf:llava-hf/llava-1.5-7b-hf.
        dtype: of its weights.
        device: "auto" takes CUDA where there is one.
        templates: `question`, `text` (no image) or `caption` in place of the family's own.
    """

    name: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    templates: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EditDataOptions:
    """Edit records: E-VQA, E-IC, VLKEB, or a file of one's own in their format.

    Attributes:
        path: the JSON file.
        images: folder that image paths are relative to and may not leave; None means the file's.
        stand_ins: folder of any pictures, shown in the place of images that are not at hand: a way
            to try a run. `images` is not looked at then, and every output says so.
        on_error: "raise" lists bad records and stops; "skip" leaves them out and counts them.
        limit: read only the first records.
    """

    path: str
    images: str | None = None
    stand_ins: str | None = None
    on_error: OnError = "raise"
    limit: Count | None = None


@dataclass(frozen=True)
class ProtocolOptions:
    """How edits are made and scored.

    Attributes:
        kind: "single" makes one edit, scores its record and undoes it; "sequential" lets edits
            pile up; "batch" makes one edit of several requests.
        counts: sequential: after so many edits all of their records are scored. batch: sizes;
            records are taken in groups of each size, and those that fill no group are left out.
            None means 1, 10, 100, and is right for single.
        compat: "mmedit" adds the definitions of published tables, which cost passes of their own.
        batch_size: records whose probes are computed at once (single: always one).
        save_every: sequential: edits between two copies of the growing edit, from which a run that
            was stopped goes on.
        save_edits: keep every edit as a folder that `editing.edits.load` reads (sequential: one
            at each count).
    """

    kind: Literal["single", "sequential", "batch"] = "single"
    counts: Annotated[list[Count], Field(min_length=1)] | None = None
    compat: list[Compat] = field(default_factory=list)
    batch_size: Count = 4
    save_every: Count = 10
    save_edits: bool = False

    def __post_init__(self) -> None:
        if self.kind == "single" and self.counts is not None:
            raise ValueError(f"counts has no meaning in kind: single, got {self.counts}")
        if self.counts is not None and len(set(self.counts)) < len(self.counts):
            raise ValueError(f"counts lists a number twice, got {self.counts}; keep one of each")

    @property
    def numbers(self) -> list[int]:
        """Numbers of edits that are scored, in order."""
        return [1] if self.kind == "single" else sorted(self.counts or COUNTS)


@dataclass(frozen=True)
class EditorRow:
    """One row of the table: an editor and its settings, an instance of its options dataclass."""

    editor: str
    options: Any


@dataclass(frozen=True)
class EditConfig:
    """An evaluation of editors, fully resolved.

    Attributes:
        name: names the run folder.
        seed: of everything drawn; what an edit draws follows from it, the editor's own seed and
            the record, not from the order of records.
        model, data, protocol: see their classes.
        editors: name of a row -> its editor.
        source: the file that it was read from.
    """

    name: str
    seed: int
    model: EditModelOptions
    data: EditDataOptions
    protocol: ProtocolOptions
    editors: Mapping[str, EditorRow]
    source: str = field(default="", compare=False)


def load_edit_config(name: str | os.PathLike[str], overrides: Iterable[str] = ()) -> EditConfig:
    """Read the config of `mmtune edit`.

    Args:
        name: a YAML file, or the name of a shipped config.
        overrides: `dotted.key=value` items, such as "editors.ft.lr=1e-3".

    Raises:
        ConfigError: with every mistake there is, not only the first.
    """
    with reading(name, overrides) as source:
        raw = source.values
        run_name = name_of(source, SECTIONS)
        return EditConfig(
            name=run_name,
            seed=checked(source, ("seed",), Seed, raw.get("seed", 0)),
            model=section(source, "model", EditModelOptions),
            data=section(source, "data", EditDataOptions),
            protocol=section(source, "protocol", ProtocolOptions),
            editors=_rows(source),
            source=source.path,
        )


def row_of(source: YamlSource, at: tuple[str, ...], raw: Any) -> EditorRow | None:
    """The editor that raw values at `at` name, with its settings; None after a mistake."""
    from editing.methods.base import editors

    known = editors()
    if not isinstance(raw, dict) or not isinstance(raw.get("editor"), str):
        got = "" if raw is None else f", got {raw!r}"
        text = f"expected a mapping such as {{editor: ft, region: vision}}{got}"
        source.add(at, f"{text}; there are the editors {listed(known)}")
        return None
    name = raw["editor"]
    if name not in known:
        text = f"no editor {name!r}; there are {listed(known)}.{did_you_mean(name, known)}"
        source.add((*at, "editor"), text)
        return None
    own = {key: value for key, value in raw.items() if key != "editor"}
    return EditorRow(name, checked(source, at, known[name].options, own, ("editor",)))


def to_yaml(config: EditConfig) -> str:
    """The resolved config as YAML that `load_edit_config` reads back to an equal config."""
    document = {
        "name": config.name,
        "seed": config.seed,
        "model": plain(config.model),
        "data": plain(config.data),
        "protocol": plain(config.protocol),
        "editors": {name: row_document(row) for name, row in config.editors.items()},
    }
    return as_yaml(document)


def row_document(row: EditorRow) -> dict[str, Any]:
    """A row as YAML has it."""
    return {"editor": row.editor, **plain(row.options)}


def _rows(source: YamlSource) -> dict[str, EditorRow]:
    raw = source.values.get("editors")
    if not isinstance(raw, dict) or not raw:
        text = "expected a mapping such as ft: {editor: ft, region: vision}"
        source.add(("editors",), f"{text}, got {raw!r}")
        return {}
    found = {}
    for name, own in raw.items():
        check_name(source, ("editors", name), name)
        if name == UNEDITED:
            source.add(("editors", name), "is the name of the model's own row; choose another")
        row = row_of(source, ("editors", name), own)
        if row is not None:
            found[name] = row
    return found
