"""Run configs: dataclasses <- YAML <- dotted overrides; all mistakes at once, with key paths."""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from mmtune.suggestions import did_you_mean
from mmtune.yaml_source import (
    ConfigError,
    Key,
    Mistake,
    YamlSource,
    as_yaml,
    listed,
    override,
    plain,
    read_yaml,
)

SECTIONS = ("name", "seed", "model", "task", "data", "tuner", "training")
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class ModelOptions:
    """The base model: a name for `mmtune.backbones.load`, and the dtype of its frozen weights."""

    name: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


@dataclass(frozen=True)
class TrainingOptions:
    """How the adapter is trained.

    Attributes:
        epochs: passes over the training pairs; a fraction is allowed.
        max_steps: optimiser steps that end training early; None means `epochs` decides.
        batch_size: samples per process and micro-batch.
        accumulation: micro-batches per optimiser step; the gradient is their mean.
        optimizer: "paged_adamw" keeps AdamW's state in memory that moves between GPU and CPU
            (CUDA and bitsandbytes only).
        lr: peak learning rate.
        weight_decay: AdamW's, on trainable matrices (biases and norms are left out).
        warmup: share of all steps, in [0, 1), in which the rate rises from zero.
        schedule: how the rate falls after warm-up.
        max_grad_norm: gradients are scaled down to this norm; 0 turns clipping off.
        precision: "bf16" runs the forward pass under autocast; weights keep their dtype.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        cuda_graphs: on a CUDA device, record forward and backward as CUDA graphs, one for each of
            the first shapes of batch, and replay them: the same numbers without waiting for
            Python. Their memory stays taken. Has no effect for several processes or with
            gradient_checkpointing, nor for what changes from step to step (queues, adapter_drop's
            robust).
        drop_last: leave out the last, incomplete batch of an epoch.
        evaluate: "epoch" evaluates the val split after every epoch.
        keep: which weights a run ends with; "best" needs evaluate: epoch.
        log_every: optimiser steps between lines of metrics.jsonl.
        save_every: optimiser steps between checkpoints; 0 writes none.
        checkpoints: how many checkpoints stay on disk.
        workers: processes that prepare batches; 0 prepares them in the main process.
        device: "auto" takes CUDA where there is one.
        report_to: a tracker that also receives the metrics.
    """

    epochs: Annotated[float, Field(gt=0)] = 5.0
    max_steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 64
    accumulation: Annotated[int, Field(ge=1)] = 1
    optimizer: Literal["adamw", "paged_adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    precision: Literal["float32", "bf16"] = "float32"
    gradient_checkpointing: bool = False
    cuda_graphs: bool = False
    drop_last: bool = True
    evaluate: Literal["none", "epoch"] = "none"
    keep: Literal["last", "best"] = "last"
    log_every: Annotated[int, Field(ge=1)] = 10
    save_every: Annotated[int, Field(ge=0)] = 500
    checkpoints: Annotated[int, Field(ge=1)] = 1
    workers: Annotated[int, Field(ge=0)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    report_to: Literal["none", "tensorboard", "trackio"] = "none"

    def __post_init__(self) -> None:
        if self.keep == "best" and self.evaluate == "none":
            raise ValueError("keep: best needs evaluate: epoch, got evaluate: none")


@dataclass(frozen=True)
class RunConfig:
    """One fine-tuning run, fully resolved.

    Attributes:
        name: names the run folder.
        seed: of everything random in the run.
        model, training: see their classes.
        task: name of the objective; `task_options` is an instance of its options dataclass.
        data: where train, val and test samples come from (`mmtune.data.DataOptions`).
        method: name of the tuner; `tuner_options` is an instance of its options dataclass.
        source: the file that it was read from.
    """

    name: str
    seed: int
    model: ModelOptions
    task: str
    task_options: Any
    data: Any
    method: str
    tuner_options: Any
    training: TrainingOptions
    source: str = field(default="", compare=False)


def config_roots() -> list[Path]:
    """Folders in which configs are found by name: the repository's, and the wheel's."""
    package = Path(__file__).resolve().parent
    editable = [package.parent / "configs"] if (package.parent / "pyproject.toml").exists() else []
    return [root for root in (*editable, package / "configs") if root.is_dir()]


def config_names() -> dict[str, Path]:
    """Every shipped config: name such as "demo/retrieval" -> file."""
    found: dict[str, Path] = {}
    for root in config_roots():
        for path in sorted(root.rglob("*.yaml")):
            found.setdefault(path.relative_to(root).with_suffix("").as_posix(), path)
    return found


def find_config(name: str | os.PathLike[str]) -> Path:
    """A file, or the shipped config called `name`. ConfigError lists those there are."""
    path = Path(name)
    if path.is_file():
        return path
    known = config_names()
    wanted = path.as_posix().removeprefix("configs/").removesuffix(".yaml").removesuffix(".yml")
    same_stem = [n for n in known if n.rsplit("/", 1)[-1] == wanted]
    if wanted in known or len(same_stem) == 1:
        return known[wanted if wanted in known else same_stem[0]]
    text = f"no such config file; shipped configs: {', '.join(known) or 'none'}."
    raise ConfigError([Mistake(str(name), "", text + did_you_mean(wanted, known))])


def load_config(name: str | os.PathLike[str], overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run config.

    Args:
        name: a YAML file, or the name of a shipped config.
        overrides: `dotted.key=value` items; values are read as YAML.

    Returns:
        The config with every section checked against its dataclass.

    Raises:
        ConfigError: with every mistake there is, not only the first.
    """
    with reading(name, overrides) as source:
        return resolve(source)


@contextmanager
def reading(name: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Iterator[YamlSource]:
    """Raw values of what `load_config` would find; after the block, ConfigError of all mistakes."""
    source = read_yaml(find_config(name))
    for item in overrides:
        override(source, item)
    yield source
    if source.mistakes:
        raise ConfigError(source.mistakes)


def resolve(source: YamlSource) -> RunConfig:
    """The run that raw values mean. Mistakes go to the source; what they concern is None."""
    raw = source.values
    name = name_of(source, SECTIONS)
    seed = checked(source, ("seed",), Annotated[int, Field(ge=0)], raw.get("seed", 0))
    model = section(source, "model", ModelOptions)
    training = section(source, "training", TrainingOptions)
    task, task_options = _chosen(source, "task", "name", _task_options)
    method, tuner_options = _chosen(source, "tuner", "method", _method_options)
    from mmtune.data import DataOptions

    data = section(source, "data", DataOptions)
    return RunConfig(
        name=name,
        seed=seed,
        model=model,
        task=task,
        task_options=task_options,
        data=data,
        method=method,
        tuner_options=tuner_options,
        training=training,
        source=source.path,
    )


def check_keys(
    source: YamlSource, raw: Mapping[Any, Any], names: Sequence[str], at: Key = ()
) -> None:
    """Note a mistake for each key of `raw`, which stands at `at`, that is not in `names`."""
    for key in raw:
        if key not in names:
            source.add((*at, key), _unknown(raw[key], names, str(key)))


def name_of(source: YamlSource, sections: Sequence[str]) -> str:
    """What a config with these sections is called: the name in it, or that of its file."""
    check_keys(source, source.values, sections)
    name = source.values.get("name", Path(source.path).stem)
    check_name(source, ("name",), name)
    return str(name)


def check_name(source: YamlSource, at: Key, name: Any) -> None:
    """Note a mistake where `name` cannot name a folder."""
    if not (isinstance(name, str) and RUN_NAME.fullmatch(name)):
        source.add(at, f"expected letters, digits, '.', '_' or '-', got {name!r}")


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal config."""
    document = {
        "name": config.name,
        "seed": config.seed,
        "model": plain(config.model),
        "task": {"name": config.task, **plain(config.task_options)},
        "data": plain(config.data),
        "tuner": {"method": config.method, **plain(config.tuner_options)},
        "training": plain(config.training),
    }
    return as_yaml(document)


def _task_options(name: str) -> type:
    from mmtune.tasks import tasks

    known = tasks()
    if name not in known:
        raise ValueError(f"no task {name!r}; there are {listed(known)}.{did_you_mean(name, known)}")
    return known[name].options


def _method_options(name: str) -> type:
    from mmtune.tuners.registry import method

    return method(name).options


def _chosen(source: YamlSource, section: str, chooser: str, options_of: Any) -> tuple[str, Any]:
    """A section whose `chooser` key says which dataclass checks its other keys."""
    raw = source.values.get(section)
    if not isinstance(raw, dict) or not isinstance(raw.get(chooser), str):
        what = "methods" if chooser == "method" else f"{section}s"
        got = "is missing" if not isinstance(raw, dict) else f"got {raw.get(chooser)!r}"
        source.add((section, chooser), f"expected a name, {got}. Try `mmtune list {what}`.")
        return "", None
    try:
        options = options_of(raw[chooser])
    except ValueError as error:
        source.add((section, chooser), str(error))
        return raw[chooser], None
    rest = {key: value for key, value in raw.items() if key != chooser}
    return raw[chooser], checked(source, (section,), options, rest, (chooser,))


def section(source: YamlSource, name: str, cls: type) -> Any:
    """A section that is a mapping checked by one dataclass; an absent one takes the defaults."""
    raw = source.values.get(name)
    return checked(source, (name,), cls, {} if raw is None else raw)


def checked(source: YamlSource, at: Key, kind: Any, raw: Any, also: tuple[str, ...] = ()) -> Any:
    """`raw` as a `kind`; every mistake goes to the source, and then the result is None."""
    _forbid_unknown_keys(kind)
    try:
        return TypeAdapter(kind).validate_python(raw)
    except ValidationError as error:
        for key, text in _mistakes(error, kind, raw, also):
            source.add((*at, *key), text)
        return None


def _forbid_unknown_keys(kind: Any) -> None:
    """Tell pydantic to refuse unknown keys of a dataclass and of the dataclasses in its fields."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if "__pydantic_config__" not in vars(kind):
            kind.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
            for hint in typing.get_type_hints(kind).values():
                _forbid_unknown_keys(hint)
    else:
        for argument in typing.get_args(kind):
            _forbid_unknown_keys(argument)


_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping",
    "path_type": "a path",
    "none_required": "null",
}


def _mistakes(
    error: ValidationError, kind: Any, raw: Any, also: tuple[str, ...]
) -> Iterable[tuple[Key, str]]:
    """(key path, text) of each mistake; the alternatives of a union are joined into one text."""
    expected: dict[Key, list[str]] = {}
    done: set[Key] = set()
    for item in error.errors(include_url=False):
        what, loc = item["type"], item["loc"]
        if what == "missing":
            yield loc, "missing; it has no default, so give it a value"
            continue
        key, got = _present(raw, loc)
        if what in ("unexpected_keyword_argument", "extra_forbidden"):
            if key not in done:
                names = _field_names(kind, key[:-1]) + (list(also) if len(key) == 1 else [])
                yield key, _unknown(got, names, str(key[-1]))
            done.add(key)
        elif what == "value_error":
            yield key, item["msg"].removeprefix("Value error, ")
            done.add(key)
        elif what == "literal_error":
            choices = item.get("ctx", {}).get("expected", "").replace("' or '", "', '")
            names = re.findall(r"'([^']*)'", choices)
            text = f"one of {listed(names)}, got {got!r}.{did_you_mean(str(got), names)}"
            expected.setdefault(key, []).append(text)
        else:
            text = _EXPECTED.get(what) or item["msg"].replace("Input should be ", "")
            expected.setdefault(key, []).append(text)
    for key, texts in expected.items():
        if key not in done:
            ended = [t for t in texts if ", got " in t]
            alternatives = " or ".join(dict.fromkeys(t for t in texts if ", got " not in t))
            joined = " or ".join(filter(None, [alternatives, *ended]))
            got = _present(raw, key)[1]
            yield key, f"expected {joined}" + ("" if ended else f", got {got!r}")


def _present(raw: Any, loc: Key) -> tuple[Key, Any]:
    """The part of pydantic's location that exists in `raw` (it also names union branches)."""
    key: list[str | int] = []
    value: Any = raw
    for part in loc:
        in_mapping = isinstance(value, Mapping) and part in value
        in_list = isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)
        if in_mapping or in_list:
            value = value[part]  # type: ignore[index]
            key.append(part)
    return tuple(key), value


def _field_names(kind: Any, at: Key) -> list[str]:
    """Names of the fields of the dataclass found by following `at` through field types."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not at:
            return [f.name for f in dataclasses.fields(kind)]
        hint = typing.get_type_hints(kind).get(str(at[0]))
        return _field_names(hint, at[1:])
    if at and isinstance(at[0], int):
        at = at[1:]
    found: list[str] = []
    for argument in typing.get_args(kind):
        found += _field_names(argument, at)
    return found


def _unknown(got: Any, names: Iterable[str], name: str) -> str:
    names = list(names)
    return f"unknown key, got {got!r}; expected one of {listed(names)}.{did_you_mean(name, names)}"
