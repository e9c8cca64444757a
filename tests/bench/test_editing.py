"""The measurement of edits runs, and what it compares is the same."""

from __future__ import annotations

import json

import torch

from editing.regions import parameters_of
from mmtune.bench import editing
from mmtune.bench.timing import Timing

TINY = editing.Size(
    layers=5,
    width=32,
    mlp=64,
    heads=4,
    kv_heads=2,
    vocabulary=1300,
    vision_layers=2,
    vision_width=32,
    vision_mlp=64,
    vision_heads=2,
    image=16,
    patch=8,
    dtype="float32",
    device="cpu",
    records=1,
    whole=1,
    written=2,
    runs=2,
    steps=1,
)


def test_it_measures_every_way_and_finds_the_same_numbers(tmp_path, capsys):
    changed = {f: getattr(TINY, f) for f in TINY.__dataclass_fields__}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in changed.items()]
    editing.main([*options, f"--out={tmp_path}"])
    found = json.loads((tmp_path / "editing.json").read_text())
    assert list(found["step"]) == ["naive", "truncated", "cached", "replayed"]
    assert list(found["edit"]) == ["plain", "cached", "replayed"]
    ways = ["one by one", "batched", "packed", "cached", "shared by 5 editors"]
    assert list(found["evaluation"]) == list(found["whole"]) == ways
    assert [shape for name, shape in found["region"].items()] == [[64, 32], [32, 64]]
    assert found["size"]["layers"] == 5
    assert found["exact"] is True
    assert found["same_choice"] == 1.0
    assert found["loss_difference"] < 1e-5
    text = capsys.readouterr().out
    assert text == (tmp_path / "editing.md").read_text()
    assert text.count("scores of a record") == text.count("answers of a record") == 5


@torch.no_grad()
def test_what_is_kept_does_not_grow_with_the_layers_below():
    """Of the layers below, what the last one gives alone is looked at: 4 layers, one output."""
    mllm = editing.model_of(TINY)
    names = parameters_of(mllm.backbone, editing.REGION)
    plain = mllm.batch(editing.probes_of(editing.records_of(TINY)[0])).packed()
    batch = mllm.cached(plain, names)
    mllm.answer_logits(batch)
    layers = set(mllm.model.model.language_model.layers)
    assert batch.packings[True] is not None
    (kept,) = batch.prefix._kept.values()
    own = [
        call.tensors[0]
        for module, (call, *_) in (
            (m, c) for m, c in zip(kept.layout.kept, kept.calls, strict=True) if c
        )
        if module in layers
    ]
    assert len(own) == 4
    assert [t.untyped_storage().nbytes() > 4 for t in own] == [False, False, False, True]


def test_quartiles():
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, 1)
    found = Timing.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.median, found.count) == (3.0, 5)
    assert 1.0 < found.low < 3.0 < found.high < 5.0
