"""The model and the records that an edit config names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from editing.datasets import load_records
from mmtune.data.records import DataError

if TYPE_CHECKING:
    from editing.config import EditDataOptions, EditModelOptions
    from editing.mllm import MLLM
    from mmtune.backbones.base import Loaded
    from mmtune.data.checking import Checked

WITHOUT_IMAGES = (
    "Images do not come with edit records: {key}.images must be the folder that image paths are "
    "relative to{now}. To try the run without them, {key}.stand_ins=DIR shows any pictures in "
    "their place; its numbers then say nothing about the data."
)


def mllm_of(options: EditModelOptions, loaded: Loaded | None = None) -> MLLM:
    """Load a model to be edited, on its device.

    Args:
        options: which one, and where.
        loaded: the model, where it is loaded already.

    Raises:
        ValueError: an unknown model, one that writes no text, or no CUDA where it is asked for.
    """
    import torch

    from editing.mllm import MLLM
    from mmtune import backbones

    there = torch.cuda.is_available()
    if options.device == "cuda" and not there:
        raise ValueError("model.device is cuda, but torch sees no CUDA device. Use cpu.")
    loaded = backbones.load(options.name, options.dtype) if loaded is None else loaded
    loaded.model.to("cuda" if there and options.device != "cpu" else "cpu")
    return MLLM(loaded, options.templates)


def records_of(options: EditDataOptions, key: str = "data", progress: bool = True) -> Checked:
    """Read the edit records of a config, and decode every image once.

    Args:
        options: where they are.
        key: names the section in messages.
        progress: draw a progress bar.

    Raises:
        DataError: see `editing.datasets.load_records`; where images are missing it says what to do.
    """
    images = None if options.stand_ins is not None else options.images
    try:
        return load_records(
            options.path, images, options.stand_ins, options.on_error, options.limit, progress
        )
    except DataError as error:
        if not _images_missing(error) or options.stand_ins is not None:
            raise
        now = f" (now {options.images!r})" if options.images else " (now that of the file)"
        raise DataError(error.problems, WITHOUT_IMAGES.format(key=key, now=now)) from None


def _images_missing(error: DataError) -> bool:
    return any(problem.reason == "missing image" for problem in error.problems)
