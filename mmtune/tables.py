"""The tables that the commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from mmtune.analysis.tables import Sheet
    from mmtune.backbones.original_checkpoints import Converted
    from mmtune.config import RunConfig
    from mmtune.dry_runs import DryRun
    from mmtune.memory import MemoryEstimate
    from mmtune.rehearsal import Rehearsal
    from mmtune.runs import Results
    from mmtune.tasks.base import Evaluation


def results_table(config: RunConfig, results: Results) -> Table:
    """Before, after and paired differences of a run."""
    from mmtune.report.numbers import rows

    title = f"{config.name}: {config.method} on {config.model.name}, {results.split} split"
    table = new_table("metric", "before", "after", "difference", title=title, right=True)
    colours = {1: "green", -1: "red", 0: ""}
    for row in rows(results):
        difference = f"{row.difference} {row.interval}".strip()
        table.add_row(row.name, row.before, row.after, _styled(difference, colours[row.sign]))
    table.caption = "brackets: 95 % intervals; differences are paired"
    return table


def evaluation_table(title: str, found: Evaluation) -> Table:
    """Metrics with their intervals."""
    from mmtune.report.numbers import with_interval

    table = new_table("metric", "value [95 %]", "queries", title=title, right=True)
    for name, metric in found.metrics.items():
        table.add_row(name, with_interval(metric), f"{metric.n:,}")
    return table


def parameter_table(config: RunConfig, model: Any, groups: Sequence[Any]) -> Table:
    """What a method trains, by branch and role."""
    from mmtune.parameters import counts

    trainable, total = counts(model)
    title = f"{config.method} on {config.model.name}"
    table = new_table("branch", "role", "tensors", "parameters", title=title, right=True)
    for group in groups:
        table.add_row(group.branch, group.role, f"{group.tensors:,}", f"{group.count:,}")
    table.add_section()
    table.add_row("trainable", "", f"{sum(g.tensors for g in groups):,}", f"{trainable:,}")
    table.add_row("all", "", "", f"{total:,}")
    table.add_row("share", "", "", f"{100 * trainable / total:.3g} %")
    return table


def conversion_table(converted: Converted) -> Table:
    """What a converted checkpoint became, and what of it has no place there."""
    model: Any = converted.model
    vision, text = model.config.vision_config, model.config.text_config
    table = new_table("part", "what became of it", title=type(model).__name__)
    table.add_row("parameters", f"{sum(p.numel() for p in model.parameters()):,}")
    table.add_row("vision tower", f"{vision.num_hidden_layers} x {vision.hidden_size}")
    table.add_row("text tower", f"{text.num_hidden_layers} x {text.hidden_size}")
    resized = vision.image_size != converted.trained_at
    made = f", positions interpolated from {converted.trained_at}" if resized else ""
    table.add_row("image size", f"{vision.image_size} pixels{made}")
    for what, count in converted.left_out.items():
        table.add_row(what, f"{count} tensors left out")
    if converted.temperature is not None:
        table.add_row(
            "temperature", f"{converted.temperature:.4g}, which transformers has no place for"
        )
    for name in converted.replaced:
        table.add_row(name, "takes the value of the output layer, which it is tied to")
    return table


def need_table(found: DryRun) -> Table:
    """What a run needs, and whether it is there."""
    table = new_table("needed", "what", "state", "", title="what the config names")
    colours = {"here": "green", "fetched": "yellow", "missing": "red"}
    for need in found.needs:
        table.add_row(need.key, need.what, _styled(need.state, colours[need.state]), need.text)
    if found.meta:
        table.caption = "the model was built without its weights, on the meta device"
    return table


def memory_table(config: RunConfig, memory: MemoryEstimate | str) -> Table:
    """What a training step takes, by kind."""
    options = config.training
    title = f"memory of a training step: {options.batch_size} samples, {options.precision}"
    table = new_table("what", "GiB", "of what", title=title)
    table.columns[1].justify = "right"
    if isinstance(memory, str):
        table.add_row("estimate", "", memory)
        return table
    kinds = {
        "weights": "parameters and buffers",
        "optimizer": "AdamW's two moments of what is trained",
        "state": "what is kept from the start: a momentum encoder",
        "gradients": "of what is trained",
        "activations": "inputs, what the backward pass needs, its own, a queue",
    }
    for name, text in kinds.items():
        table.add_row(name, f"{getattr(memory, name) / 2**30:.3f}", text)
    table.add_section()
    table.add_row(
        "estimate", f"{memory.total / 2**30:.2f}", "without CUDA context, workspaces, fragments"
    )
    return table


def rehearsal_table(found: Rehearsal) -> Table:
    """What a rehearsal measured."""
    table = new_table("measured", "", title=f"{found.name}: rehearsal on {found.model}")
    share = 100 * found.trainable / found.total
    estimate = found.estimate
    expected = estimate if isinstance(estimate, str) else f"{estimate / 2**30:.2f} GiB"
    rows = {
        "device": str(found.manifest["device"]),
        "method": f"{found.method}, {found.trainable:,} parameters ({share:.3g} %)",
        "steps": f"{found.steps} of {found.batch} samples",
        "median step": f"{1000 * found.step_seconds:.1f} ms, data loading left out",
        "samples a second": f"{found.samples_per_second:.1f}",
        "all steps": f"{found.seconds:.1f} s, data loading included",
        f"peak memory ({found.memory_kind})": f"{found.peak_memory / 2**30:.2f} GiB",
        "estimate": expected,
        "loss": f"{found.first_loss:.4f} -> {found.last_loss:.4f} on made-up data",
    }
    for row in rows.items():
        table.add_row(*row)
    return table


def sheet_table(sheet: Sheet) -> Table:
    """A table of an analysis."""
    table = new_table(*sheet.header, title=sheet.title, right=True)
    for line in sheet.lines:
        table.add_row(*line)
    table.caption = sheet.note or None
    return table


def new_table(*columns: str, title: str | None = None, right: bool = False) -> Table:
    """An empty table whose texts fold; `right` aligns all columns but the first to the right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if right and index else "left", overflow="fold")
    return table


def _styled(text: str, style: str) -> Any:
    from rich.text import Text

    return Text(text, style=style)


def matrix() -> list[Table]:
    """Which method is tested on which backbone, and what is refused."""
    from mmtune.conformance import methods as suite

    rows = suite.matrix()
    table = new_table("method", *(b.replace("-", "\n") for b in next(iter(rows.values()))))
    table.columns[0].no_wrap = True
    for method, cells in rows.items():
        table.add_row(method, *("yes" if works else "no" for works in cells.values()))
    refused = new_table("refused", "on", "because")
    for row in suite.refusals():
        refused.add_row(*row)
    return [table, refused]


def _backbones() -> list[Table]:
    from mmtune import zoo
    from mmtune.backbones import families
    from mmtune.backbones.blip2 import Blip2
    from mmtune.backbones.interleaved import Interleaved
    from mmtune.backbones.loading import SCHEMES

    table = new_table("backbone", "what it is", "edit, probe")
    for name, cls in families().items():
        asked = issubclass(cls, Blip2 | Interleaved)  # an image and a text in, a text out
        table.add_row(name, cls.summary, "yes" if asked else "")
    names = new_table("model.name", "")
    for scheme, text in SCHEMES.items():
        names.add_row(scheme, text)
    ships = new_table("ships", "what it is")
    for model in zoo.names()["models"]:
        ships.add_row(f"zoo:{model}", f"{zoo.summary(model)} (@{' @'.join(zoo.flavours(model))})")
        for editor in zoo.trained_editors(model):
            ships.add_row(f"zoo:{editor}", f"{editor.partition('/')[2]}, trained for {model}")
    for pipeline in zoo.names()["pipelines"]:
        ships.add_row(f"zoo:{pipeline}", f"{zoo.summary(pipeline)} (text to image)")
    return [table, names, ships]


def _methods() -> list[Table]:
    from mmtune.tuners.registry import methods

    table = new_table("method", "what it trains", "source", "options")
    for method in [methods()[name] for name in sorted(methods())]:
        table.add_row(method.name, method.summary, method.source, _fields(method.options))
    return [table]


def _editors() -> list[Table]:
    from editing.meta.base import TrainedEditor
    from editing.methods.base import editors

    table = new_table("editor", "what it does", "trained first", "source", "options")
    for name, cls in sorted(editors().items()):
        trained = "yes" if issubclass(cls, TrainedEditor) else ""
        table.add_row(name, cls.summary, trained, cls.source, _fields(cls.options))
    return [table]


def _tasks() -> list[Table]:
    from mmtune.tasks import tasks

    table = new_table("task", "objective", "options")
    for name, cls in tasks().items():
        table.add_row(name, cls.summary, _fields(cls.options))
    return [table]


def _configs() -> list[Table]:
    from mmtune.config import config_names

    table = new_table("config", "command")
    for name, path in config_names().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        table.add_row(name, first.removeprefix("#").strip())
    return [table]


LISTED = {
    "backbones": _backbones,
    "methods": _methods,
    "tasks": _tasks,
    "configs": _configs,
    "editors": _editors,
}


def _fields(cls: type) -> str:
    return ", ".join(getattr(cls, "__dataclass_fields__", {}))
