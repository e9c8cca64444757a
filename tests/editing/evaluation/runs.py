"""Evaluations of tiny models: records in their words, pictures, configs, and an editor."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from editing.changes import Delta
from editing.config import load_edit_config
from editing.evaluation.running import evaluate
from editing.methods.base import Editor, editors
from editing.weight_edits import WeightEdit
from tests.editing.edit_items import DATA, hop, item
from tests.editing.tiny import paths, tiny

FILES = {
    "evqa": DATA / "mmedit" / "vqa_eval.json",
    "eic": DATA / "mmedit" / "caption_eval_edit.json",
    "vlkeb": DATA / "vlkeb" / "eval_edit_onehop.json",
}
TEXTS = ("src", "pred", "alt", "rephrase", "loc", "loc_ans", "m_loc_q", "m_loc_a")


@dataclass(frozen=True)
class Options:
    seed: int = 0
    size: float = 0.0  # of the change
    fails: str = ""  # the id of a record that it cannot edit


class Nudge(Editor):
    """Adds drawn numbers to one weight: any change there is, or none."""

    name, summary, source, options = "nudge", "", "", Options

    def make(self, mllm, requests, generator):
        if self.settings.fails in [r.id for r in requests]:
            raise ValueError(f"record {self.settings.fails} is beyond me")
        path = paths(mllm)[-1]
        shape = mllm.model.get_parameter(path).shape
        drawn = self.settings.size * torch.randn(shape, generator=generator)
        return WeightEdit.of(mllm, {path: Delta(drawn)}, {"drawn": float(drawn.sum())})


def add_editors(patch):
    """Let configs name `nudge`; `patch` is pytest's monkeypatch."""
    known = {**editors(), Nudge.name: Nudge}
    for place in ("editing.methods.base.editors",):
        patch.setattr(place, lambda: known)


def in_words(text):
    """A text in the tiny models' words: equal words stay equal."""
    return " ".join(f"w{3 + zlib.crc32(word.encode()) % 56}" for word in text.split()[:6])


def items(count=6, source=None):
    """Records in the tiny models' words: published ones where they are at hand, else made up."""
    file = FILES.get(source)
    if file is not None and file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))[:count]
    else:
        found = [item(i, port_new=[hop(port_q=f"who made {i}?")]) for i in range(count)]
    made = []
    for one in found:
        one = one | {name: in_words(one[name]) for name in TEXTS if name in one}
        if "port_new" in one:
            one["port_new"] = [
                h | {n: in_words(h[n]) for n in ("port_q", "port_a")} for h in one["port_new"]
            ]
        if one["pred"] == one["alt"]:
            one["pred"] = "w3 w3 w3"
        made.append(one)
    return made


def setup(folder, count=6, source=None, found=None):
    """Write records.json and pictures into a folder; returns the raw `data:` section."""
    folder.mkdir(parents=True, exist_ok=True)
    found = items(count, source) if found is None else found
    (folder / "records.json").write_text(json.dumps(found), encoding="utf-8")
    for one in found:
        for name in ("image", "image_rephrase", "m_loc"):
            path = folder / "images" / one[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(zlib.crc32(one[name].encode())).save(path)
    return {"path": str(folder / "records.json"), "images": str(folder / "images")}


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def config_of(folder, data, editors, kind="single", **protocol):
    """The config of a run, through its file."""
    document = {
        "name": "run",
        "model": {"name": "hf:tiny"},
        "data": data,
        "protocol": {"kind": kind, **protocol},
        "editors": editors,
    }
    path = Path(folder) / "edit.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return load_edit_config(path)


def run(folder, config, name="llava", mllm=None, **options):
    """Evaluate; returns the report."""
    return evaluate(config, folder / "runs", mllm=mllm or tiny(name), **options)


def lines(path, drop=("seconds",)):
    """The lines of a journal, without what differs from run to run."""
    texts = Path(path).read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(t).items() if k not in drop} for t in texts]


def limited(config, **data):
    return replace(config, data=replace(config.data, **data))
