"""The arguments of `mmtune ui`, and what is loaded for its page."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mmtune.shown import Findings

if TYPE_CHECKING:
    from mmtune.data.checking import Checked
    from mmtune.ui.editing import Desk
    from mmtune.ui.search import ImageSearch

NOTHING = (
    "nothing to show. Search needs --run RUN, or --model NAME and --images DIR, such as `mmtune ui "
    "--model zoo:tiny-clip --images zoo:clipart-animals`; Edit needs --mllm NAME, such as --mllm "
    "zoo:tiny-llava."
)


def add_commands(new: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the command; `new` makes the parser of a command from its name and summary.

    The parsed options have `show`, which takes them and returns `Findings`.
    """
    ui = new("ui", "search images, and edit a model, on a page in the browser")
    search = ui.add_argument_group("search images by text, base and adapter side by side")
    search.add_argument("--run", type=Path, metavar="RUN", help="a run folder of a retrieval task")
    search.add_argument("--model", metavar="NAME", help="or a model, such as zoo:tiny-clip")
    search.add_argument("--adapter", type=Path, metavar="DIR", help="(a run has its own)")
    search.add_argument("--images", metavar="DIR", help="a folder, or zoo:NAME (a run has its own)")
    edit = ui.add_argument_group("edit a multimodal language model")
    edit.add_argument("--mllm", metavar="NAME", help="such as zoo:tiny-llava")
    ui.add_argument("--port", type=int, default=7860, help="0: one that is free (default: 7860)")
    ui.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1, this machine alone)")
    ui.set_defaults(show=_ui)


def _ui(options: argparse.Namespace) -> Findings:
    from mmtune.ui.problems import PageProblem, require_gradio

    require_gradio()
    if not 0 <= options.port <= 65535:
        raise PageProblem(f"--port must be in 0..65535, got {options.port}")
    search = _search(options)
    desk = _desk(options.mllm)
    if search is None and desk is None:
        raise PageProblem(NOTHING)
    from mmtune.ui.app import page, serve

    url, wait = serve(page(search, desk), options.host, options.port)
    return Findings([], [f"page: {url} (Ctrl-C stops it)"], then=wait)


def _desk(name: str | None) -> Desk | None:
    if name is None:
        return None
    from editing.config import EditModelOptions
    from editing.loading import mllm_of
    from mmtune.ui.editing import Desk

    return Desk(mllm_of(EditModelOptions(name)))


def _search(options: argparse.Namespace) -> ImageSearch | None:
    """What the options say about the tab Search; None where they say nothing.

    Raises:
        PageProblem: they do not go together.
        RunError, DataError: the run or the pictures cannot be used.
    """
    import torch

    from mmtune.ui.problems import PageProblem
    from mmtune.ui.search import image_search

    if options.run is not None and options.model is not None:
        raise PageProblem("give --run, which names its model, or --model, not both")
    there = "cuda" if torch.cuda.is_available() else "cpu"
    if options.run is not None:
        return _of_run(options.run, options.adapter, options.images)
    if options.model is None:
        given = [n for n in ("adapter", "images") if getattr(options, n) is not None]
        if given:
            raise PageProblem(f"--{given[0]} needs --model NAME, or --run RUN, beside it")
        return None
    if options.images is None:
        raise PageProblem("--model needs --images DIR, such as a folder or zoo:clipart-animals")
    found = _pictures(options.images)
    return image_search(
        options.model, found.records, options.adapter, device=there, left_out=found.skipped
    )


def _of_run(run: Path, adapter: Path | None, images: str | None) -> ImageSearch:
    from mmtune.config import load_config
    from mmtune.data.checking import load_data
    from mmtune.data.options import DataOptions
    from mmtune.device import device_of
    from mmtune.runs import RunFolder
    from mmtune.ui.problems import PageProblem
    from mmtune.ui.search import image_search

    folder = RunFolder(run)
    folder.check_holds_run()
    config = load_config(folder.config)
    source = config.data.test or config.data.val
    if images is not None:
        found = _pictures(images)
    elif source is None:
        raise PageProblem(f"{folder.config} has no data.test; name pictures with --images DIR")
    else:
        found = load_data(DataOptions(test=source, on_error=config.data.on_error))["test"]
    return image_search(
        config.model.name,
        found.records,
        adapter or folder.adapter,
        config.model.dtype,
        str(device_of(config.training)),
        found.skipped,
    )


def _pictures(images: str) -> Checked:
    """The pictures that `--images` names, those that cannot be decoded left out."""
    from mmtune.data.checking import check
    from mmtune.data.options import SourceOptions
    from mmtune.data.readers import read
    from mmtune.ui.search import pictures_in

    scheme, _, name = images.partition(":")
    if scheme != "zoo":
        return check(pictures_in(images), "skip", name="pictures")
    return check(read(SourceOptions("zoo", name=name), "test"), "skip", name=name)
