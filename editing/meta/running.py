"""The training of an editor from a config to a folder: what `mmtune edit-train` does."""

from __future__ import annotations

import logging
import os
import random
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editing.meta.config import to_yaml
from mmtune.checkpoints import TrainingError
from mmtune.runs import RunFolder, manifest, write_json, write_text

if TYPE_CHECKING:
    from editing.meta.config import MetaConfig
    from editing.meta.training import MetaResult
    from editing.requests import EditRecord

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MetaRun:
    """A finished training of an editor.

    Attributes:
        config: of the run.
        result: see `MetaResult`.
        folder: it is in.
        notes: what a reader must know about the data.
    """

    config: MetaConfig
    result: MetaResult
    folder: RunFolder
    notes: tuple[str, ...] = ()

    @property
    def trained(self) -> Path:
        """What the editor's option `trained` names."""
        return self.folder.path / "trained"


def edit_train(
    config: MetaConfig,
    folder: RunFolder,
    resume: bool = False,
    overwrite: bool = False,
    tell: Callable[[str], None] = log.info,
    progress: bool = True,
) -> MetaRun:
    """Train an editor and write trained/, metrics.jsonl, results.json and report.html.

    Args:
        config: of the run.
        folder: where it is written.
        resume: go on from its newest checkpoint.
        overwrite: delete a run that is already there.
        tell: receives one line before each stage that takes time.
        progress: draw progress bars.

    Raises:
        RunError, TrainingError, DataError, and what the model and its region raise.
    """
    from editing.loading import mllm_of
    from editing.meta.training import train_editor
    from editing.methods.base import editors

    _require_one_process()
    folder.check(resume, overwrite)
    tell("reading the records")
    records = read(config, progress)
    tell(f"loading {config.model.name}")
    mllm = mllm_of(config.model)
    editor: Any = editors()[config.editor](config.options)
    editor.weights(mllm)  # a region that is not there is refused before anything is written
    folder.start(to_yaml(config), resume, overwrite)
    files = map(Path, records.files)
    about = manifest(config.seed, _device(mllm.device.type), files, sys.argv)
    write_json(folder.path / "manifest.json", about)
    tell(f"training {config.editor} on {len(records.train):,} records")
    result = train_editor(
        editor, mllm, records.train, records.val, config.training, folder.path, config.seed,
        resume, progress,
    )  # fmt: skip
    run = MetaRun(config, result, folder, records.notes)
    _write(run, about)
    return run


def _require_one_process() -> None:
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1:
        raise TrainingError(
            f"an editor is trained by one process, and this is one of {count}: its running "
            "statistics are those of every record. Start it without torchrun; on several GPUs "
            "train one editor on each."
        )


def _device(kind: str) -> str:
    import torch

    return torch.cuda.get_device_name() if kind == "cuda" else kind


@dataclass(frozen=True)
class Records:
    """What an editor learns from and what chooses, the files they stand in, what to know."""

    train: list[EditRecord]
    val: list[EditRecord]
    files: list[str]
    notes: tuple[str, ...]


def read(config: MetaConfig, progress: bool = True) -> Records:
    """The records of a config, those held out taken apart.

    Raises:
        DataError: see `editing.loading.records_of`.
        TrainingError: none is left to learn from.
    """
    from editing.loading import records_of

    found, notes, data = {}, [], config.data
    for role, options in (("train", data.train), ("val", data.val)):
        if options is None:
            continue
        key = f"data.{role}"
        found[role] = checked = records_of(options, key, progress)
        notes += [f"{n:,} records of {key} left out: {why}" for why, n in checked.skipped.items()]
        if options.stand_ins is not None:
            notes.append(f"{key} showed stand-ins: the numbers say nothing about the data")
    files = [file for checked in found.values() for file in checked.files]
    if data.val is not None:
        return Records(found["train"].records, found["val"].records, files, tuple(notes))
    train, val = held_out(found["train"].records, data.held_out, config.seed)
    notes.append(f"{len(val):,} records of data.train were held out to validate on")
    return Records(train, val, files, tuple(notes))


def held_out(
    records: Sequence[EditRecord], count: int, seed: int
) -> tuple[list[EditRecord], list[EditRecord]]:
    """(the others, at least `count` records of images that are drawn): no edit image is in both.

    Raises:
        TrainingError: there are no others.
    """
    groups: dict[Any, list[EditRecord]] = {}
    for record in records:
        groups.setdefault(_image(record), []).append(record)
    images = list(groups)
    random.Random(seed).shuffle(images)
    taken: set[Any] = set()
    held = 0
    for image in images:
        if held >= count:
            break
        taken.add(image)
        held += len(groups[image])
    if len(taken) == len(images):
        raise TrainingError(
            f"data.held_out is {count}, and data.train has {len(records)} records about "
            f"{len(images)} images: none is left to learn from. Lower data.held_out."
        )
    train = [record for record in records if _image(record) not in taken]
    return train, [record for record in records if _image(record) in taken]


def _image(record: EditRecord) -> Any:
    """What tells its edit from those about other images; without an image, the record itself."""
    return record.request.image or record.where or record.id


def _write(run: MetaRun, about: Mapping[str, Any]) -> None:
    from editing.meta.page import render_page

    lines = run.folder.log()
    write_text(run.folder.path / "report.html", render_page(run, lines, about))
    results = {"editor": run.config.editor, **asdict(run.result), "notes": list(run.notes)}
    write_json(run.folder.results, results)
    # The best is in trained/ now; a finished run is not gone on with.
    shutil.rmtree(run.folder.path / "checkpoints", ignore_errors=True)
