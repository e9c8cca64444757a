"""The configs of `mmtune edit-train`: dataclasses <- YAML <- dotted overrides."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from editing.config import EditDataOptions, EditModelOptions
from editing.ranges import Count, NotNegative, Seed
from mmtune.config import checked, name_of, reading, section
from mmtune.suggestions import did_you_mean
from mmtune.yaml_source import YamlSource, as_yaml, listed, plain

SECTIONS = ("name", "seed", "model", "data", "editor", "training")


@dataclass(frozen=True)
class MetaDataOptions:
    """Records to be trained on, and records that say when to stop and what to keep.

    Attributes:
        train: the records to learn from.
        val: those that choose; without it, some of train's are held out of the training.
        held_out: how many at least: all records of images that the seed draws.
    """

    train: EditDataOptions
    val: EditDataOptions | None = None
    held_out: Count = 200


@dataclass(frozen=True)
class MetaTrainingOptions:
    """How an editor is trained, by AdamW at a constant rate.

    Attributes:
        steps: of the optimiser, at most.
        batch_size: records whose losses are computed at once; their requests are one edit.
        accumulation: batches per step; the gradient is their mean.
        lr: the learning rate; an editor may have others among its own settings.
        weight_decay: AdamW's.
        max_grad_norm: gradients are scaled down to this norm; 0 turns clipping off.
        validate_every: steps between validations; the last step is followed by one too.
        patience: validations in a row without a lower loss that end the training; 0 never does.
        log_every: steps between lines of metrics.jsonl.
        save_every: steps between checkpoints, of which the newest is kept; 0 writes none.
        seconds: wall time after which no step is begun; 0 sets no limit.
    """

    steps: Count = 50_000
    batch_size: Count = 1
    accumulation: Count = 2
    lr: Annotated[float, Field(gt=0)] = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 100.0
    validate_every: Count = 1_000
    patience: Annotated[int, Field(ge=0)] = 5
    log_every: Count = 50
    save_every: Annotated[int, Field(ge=0)] = 500
    seconds: NotNegative = 0.0


@dataclass(frozen=True)
class MetaConfig:
    """The training of one editor, fully resolved.

    Attributes:
        name: names the run folder.
        seed: of the network's draw, of the order of the records and of what is drawn on the way.
        model, data, training: see their classes.
        editor: its name.
        options: an instance of its options dataclass.
        source: the file that it was read from.
    """

    name: str
    seed: int
    model: EditModelOptions
    data: MetaDataOptions
    editor: str
    options: Any
    training: MetaTrainingOptions
    source: str = field(default="", compare=False)


def load_meta_config(name: str | os.PathLike[str], overrides: Iterable[str] = ()) -> MetaConfig:
    """Read the config of `mmtune edit-train`.

    Args:
        name: a YAML file, or the name of a shipped config.
        overrides: `dotted.key=value` items, such as "editor.rank=8".

    Raises:
        ConfigError: with every mistake there is, not only the first.
    """
    with reading(name, overrides) as source:
        raw = source.values
        run_name = name_of(source, SECTIONS)
        editor, options = _editor(source)
        return MetaConfig(
            name=run_name,
            seed=checked(source, ("seed",), Seed, raw.get("seed", 0)),
            model=section(source, "model", EditModelOptions),
            data=section(source, "data", MetaDataOptions),
            editor=editor,
            options=options,
            training=section(source, "training", MetaTrainingOptions),
            source=source.path,
        )


def to_yaml(config: MetaConfig) -> str:
    """The resolved config as YAML that `load_meta_config` reads back to an equal config."""
    document = {
        "name": config.name,
        "seed": config.seed,
        "model": plain(config.model),
        "data": plain(config.data),
        "editor": {"name": config.editor, **plain(config.options)},
        "training": plain(config.training),
    }
    return as_yaml(document)


def _editor(source: YamlSource) -> tuple[str, Any]:
    """The editor and its settings; what is wrong with them goes to the source."""
    from editing.meta.base import TrainedEditor
    from editing.methods.base import editors

    trained = {name: cls for name, cls in editors().items() if issubclass(cls, TrainedEditor)}
    raw = source.values.get("editor")
    name = raw.get("name") if isinstance(raw, dict) else raw
    if not isinstance(raw, dict) or name not in trained:
        text = f"expected an editor that is trained, {listed(trained)}; got {name!r}"
        hint = did_you_mean(str(name), trained)
        at = ("editor", "name") if isinstance(raw, dict) else ("editor",)
        source.add(at, f"{text}.{hint}")
        return "", None
    own = {key: value for key, value in raw.items() if key != "name"}
    options = checked(source, ("editor",), trained[name].options, own, ("name",))
    if options is not None and options.trained:
        text = f"is what this command writes; leave it out (got {options.trained!r})"
        source.add(("editor", "trained"), text)
    return str(name), options
