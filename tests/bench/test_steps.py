"""`mmtune bench` on the zoo: what is measured is what is said, and errors are lines."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from mmtune.bench.contestants import contestants
from mmtune.bench.steps import Line, Setting, measured
from mmtune.bench.subjects import ready
from mmtune.bench.tables import rows
from mmtune.bench.timing import Timing
from mmtune.cli import main
from mmtune.conformance.backbones import build

SMALL = Setting("tiny-clip", batch=2, dtype="float32", device="cpu", runs=1, warm=1)


def projections():
    stock = ready("tiny-clip", 1, torch.float32, torch.device("cpu"), 0).stock
    ends = ("q_proj", "k_proj", "v_proj", "out_proj")
    return [module for name, module in stock.named_modules() if name.endswith(ends)]


def test_a_run_writes_lines_table_and_picture(tmp_path, capsys):
    names = ["floor", "aurora", "peft-lora"]
    command = ["bench", "tiny-clip", "--methods", *names, "--batch", "2", "--runs", "1"]
    assert main([*command, "--device", "cpu", "--out", str(tmp_path)]) == 0
    lines = [json.loads(x) for x in (tmp_path / "tiny-clip-cpu.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == names
    widths = [m.in_features for m in projections()]
    assert lines[0]["trainable"] == 0
    assert lines[1]["trainable"] == sum(64 * (2 * d + 1) for d in set(widths)) + 64 * len(widths)
    assert lines[2]["trainable"] == sum(64 * 2 * d for d in widths)
    table = (tmp_path / "tiny-clip-cpu.md").read_text().splitlines()
    assert len(table) == 2 + len(names)
    assert (tmp_path / "tiny-clip-cpu.svg").read_text().count("<svg") == 1
    assert "aurora" in capsys.readouterr().out


def test_the_floor_reaches_the_embeddings_and_trains_nothing(monkeypatch):
    bench = ready("tiny-clip", 2, torch.float32, torch.device("cpu"), 0)
    model = contestants()["floor"].make(bench.stock)
    reached = []
    for name, module in model.named_modules():
        if name.endswith(("patch_embedding", "token_embedding")):
            module.register_forward_hook(
                lambda m, a, out, name=name: (
                    out.register_hook(lambda g: reached.append(name)) and None
                )
            )
    bench.loss(model, bench.inputs).backward()
    assert len(reached) == 2
    assert all(p.grad is None for p in model.parameters())


def test_every_contestant_begins_with_the_same_weights(monkeypatch):
    seen = []
    stock = contestants()["full"]

    def make(model):
        seen.append([p.clone() for p in model.parameters()])
        return stock.make(model)

    monkeypatch.setattr("mmtune.bench.steps.contestants", lambda: {"full": type(stock)("", make)})
    list(measured(SMALL, ["full", "full"]))
    assert all(torch.equal(first, second) for first, second in zip(*seen, strict=True))


def test_unknown_names_are_told_with_those_that_there_are():
    with pytest.raises(ValueError, match="no contestant 'unmade' to measure; there are floor"):
        list(measured(SMALL, ["unmade"]))
    with pytest.raises(ValueError, match="no subject 'clip' to measure; there are clip-l-14"):
        list(measured(Setting("clip"), ["floor"]))


def test_a_failure_does_not_end_the_run(monkeypatch):
    stock = contestants()

    def broken(model):
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr(
        "mmtune.bench.steps.contestants",
        lambda: stock | {"broken": type(stock["floor"])("", broken)},
    )
    lines = list(measured(SMALL, ["broken", "floor"]))
    assert lines[0].error == "RuntimeError: out of memory"
    assert lines[1].step is not None
    assert "out of memory" in rows(lines)[0][1]


def test_ratios_are_of_medians_and_peaks():
    def line(name, median, peak):
        return Line(name, SMALL, 2, Timing(median, median, median, 1), median / 2, peak, 5)

    table = rows([line("floor", 10.0, 2**30), line("full", 20.0, 2**31), line("x", 5.0, 2**29)])
    assert table[2] == ["x", "5.0 [5.0, 5.0]", "0.50", "0.25", "", "2.5", "0.50", "0.50", "5"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [({}, "need a CUDA device"), ({"device": "cuda", "compiled": True}, "choose one of compiled")],
)
def test_graphs_that_there_cannot_be_are_refused(changes, words):
    setting = dataclasses.replace(SMALL, cuda_graphs=True, **changes)
    with pytest.raises(ValueError, match=words):
        next(measured(setting, ["floor"]))


def test_methods_are_prepared_and_what_they_are_compared_with_is_stock():
    wanted = {"floor": False, "full": False, "peft-lora": False}
    wanted |= {"floor-prepared": True, "lora": True, "aurora": True}
    for name, prepared in wanted.items():
        model = contestants()[name].make(build("clip"))
        kinds = {type(m).__name__ for m in model.modules()}
        assert ("QuickGelu" in kinds, "QuickGELUActivation" in kinds) == (prepared, not prepared)
