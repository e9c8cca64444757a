"""Samples as every stage has done with them, with small pictures on disk."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any, cast

from PIL import Image

from data_builders.builds import Build, StageReport
from data_builders.config import load_build_config
from data_builders.pictures import MADE, Pictures
from data_builders.samples import Candidate, Keeper, Sample
from data_builders.sources.easyedit import EasyEdit, EasyEditOptions
from editing.config import EditModelOptions


def pictures_in(folder):
    roots = {"source": folder / "source", "image": folder / "pool", MADE: folder / "made"}
    for path in roots.values():
        path.mkdir(parents=True, exist_ok=True)
    return Pictures(roots)


def draw(path, number):
    """A picture of its own for every number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), (number * 7 % 256, number // 30, 90)).save(path)


def finished(pictures, count=6, evals=2):
    """Samples without a defect; the last `evals` are of the split eval."""
    found = []
    for n in range(count):
        for at, name in enumerate(
            (f"source/sub/{n}.png", f"made/imagine/{n}.png", f"pool/{n}.png")
        ):
            folder, _, rest = name.partition("/")
            root = {"source": "source", "made": MADE, "pool": "image"}[folder]
            draw(pictures.roots[root] / rest, 3 * n + at)
        rejected = Candidate(
            f"source:sub/{n}.png",
            "a thing",
            "pairs",
            scores={"clip_image": 0.99},
            reason="too alike",
        )
        chosen = Candidate(
            f"made:imagine/{n}.png", "a thing", "pairs", scores={"clip_text": 0.31, "contrast": 9.0}
        )
        found.append(
            Sample(
                id=f"q{n}",
                question=f"What is number {n}?",
                image=f"source:sub/{n}.png",
                answers=("a cup", "a cup", "a mug"),
                target=f"cup {n}",
                prediction="a hat",
                captions=("a cup on a table",),
                concept="cup",
                rephrase=f"Which thing is number {n}?",
                candidates=(chosen, rejected),
                image_rephrase=f"made:imagine/{n}.png",
                text_locality=Keeper(f"Who was king {n}?", f"Louis {n}", id=f"t{n}"),
                image_locality=Keeper("What colour?", "red", f"image:{n}.png", f"i{n}"),
                split="eval" if n >= count - evals else "train",
                licence="CC BY 4.0",
                fields={"question_id": n},
            )
        )
    return found


def build_of(pictures, folder, options, recipe="evqa"):
    """A build whose stages have run, without having run them."""
    config = replace(
        load_build_config("demo/build"), name="my-set", recipe=recipe, seed=3,
        model=EditModelOptions("hf:some/model"), assemble=options,
    )  # fmt: skip
    reports = [
        StageReport(
            "select", "select", "questions", {"below": 0.3}, 40, 12,
            {"answered rightly": 25, "no agreed answer": 2}, {"missing image": 1}, 12.5,
            {"torch": "2.14.1"},
        ),
        StageReport("rephrase", "rephrase", "chat", {"model": "a/chat"}, 12, 6, {"a refusal": 6}),
    ]  # fmt: skip
    sources = {"source": EasyEdit(EasyEditOptions("x.json"))}
    context: Any = None
    return Build(config, folder, pictures, context, reports, cast("Any", sources))


MANIFEST = {
    "command": "mmtune build my.yaml",
    "git_commit": "abc",
    "versions": {"mmtune": "0.1.0"},
    "data": {"x.json": {"sha256": "f00", "bytes": 1234}},
}


def digests(folder):
    """Path -> hash of every file below a folder."""
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
