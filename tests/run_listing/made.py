"""A folder with a run of every kind, each written by the command that makes such runs."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from shutil import copytree

import pytest
import yaml


def make(folder):
    """Fill `folder`/runs; returns it. Every kind is there, finished."""
    runs = folder / "runs"
    for maker in (trained, edited, edit_trained, built, probed, benched):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TQDM_DISABLE", "1")
            place = folder / maker.__name__
            place.mkdir()
            maker(place, runs, patch)
    return runs


def trained(folder, runs, patch):
    """A comparison, and two of its cells as runs of their own: ordinary runs, as they are."""
    from mmtune.compare.config import load_comparison
    from mmtune.compare.running import compare
    from tests.compare import small

    small.install(patch.setattr)
    path = folder / "small.yaml"
    path.write_text(small.CONFIG)
    compare(load_comparison(path), runs, setup=small.install, apart=False)
    for name in ("narrow-seed0", "wide-seed0"):
        copytree(runs / "small/cells" / name, runs / name)


def edited(folder, runs, patch):
    from tests.editing.evaluation import runs as small
    from tests.editing.tiny import tiny

    small.add_editors(patch)
    patch.setattr("editing.mllm.WRITTEN", 4)
    editors = {
        "still": {"editor": "nudge", "fails": "0"},
        "tuned": {"editor": "ft", "lr": 0.05},
    }
    config = small.config_of(folder, small.setup(folder, 3), editors)
    small.run(runs.parent, replace(config, name="edits"), mllm=tiny("llava"))


def edit_trained(folder, runs, patch):
    import json

    import editing.loading
    from editing.meta.config import load_meta_config
    from editing.meta.running import edit_train
    from mmtune.runs import RunFolder
    from tests.editing.meta_records import random_records
    from tests.editing.test_edit_train_command import CONFIG, item
    from tests.editing.tiny import tiny

    items = [item(record, i, folder) for i, record in enumerate(random_records(6))]
    (folder / "records.json").write_text(json.dumps(items))
    (folder / "small.yaml").write_text(CONFIG.replace("DIR", str(folder)))
    patch.setattr(editing.loading, "mllm_of", lambda options: tiny("llava"))
    config = load_meta_config(folder / "small.yaml", ["name=learned"])
    edit_train(config, RunFolder(runs / "learned"), progress=False)


def built(folder, runs, patch):
    from tests.data_builders import small_build

    small_build.install(patch.setattr)
    small_build.run(small_build.write_config(folder), runs, ["name=records"])


def probed(folder, runs, patch):
    from mmtune.probe import running
    from mmtune.probe.config import load_probe_config
    from mmtune.probe.page import write_pages
    from mmtune.probe.tables import numbers_of
    from tests.probe.sets import Told, item, written

    @contextmanager
    def client_of(name, options):
        yield Told(lambda sent: "yes")

    patch.setattr(running, "client_of", client_of)
    items = [item(f"{i}", "yes" if i % 4 else "no", f"{i}.png") for i in range(8)]
    document = {
        "name": "asked",
        "items": {"format": "jsonl", "path": str(written(folder, items))},
        "models": {"told": {"model": {"name": "none"}}},
        "styles": ["simple", "reasoning"],
    }
    (folder / "asked.yaml").write_text(yaml.safe_dump(document))
    found = running.probe(load_probe_config(folder / "asked.yaml"), runs)
    write_pages(found, numbers_of(found), runs / "asked")


def benched(folder, runs, patch):
    from mmtune.bench import running
    from mmtune.bench.steps import Line, Setting
    from mmtune.bench.timing import Timing

    setting = Setting("tiny", device="cpu")

    def measured(setting, names):
        yield Line("floor", setting, 2, Timing(1.0, 2.0, 3.0, 5))
        yield Line("aurora", setting, 2, Timing(2.0, 3.5, 4.0, 5), trainable=70)
        yield Line("qlora", setting, 2, error="no CUDA")

    patch.setattr(running, "measured", measured)
    running.run(setting, ["floor", "aurora", "qlora"], runs / "bench")
