"""The two commands from their arguments to what they print, and what they refuse."""

from __future__ import annotations

import json

import pytest
import torch

from mmtune import cli
from mmtune.runs import RunFolder
from tests.analysis import made
from tests.report.browser import looks_right
from tests.test_cli import CONFIG, PairTask


@pytest.fixture
def adapter(tmp_path):
    return made.save(made.wrap(made.lora()), tmp_path / "adapter")


def refusal(capsys, *arguments):
    """What a command that the user can mend prints: one sentence or two on one line."""
    capsys.readouterr()
    assert cli.main(arguments) == cli.USER_ERROR
    text = capsys.readouterr().err.strip().splitlines()
    assert len(text) == 1, text
    return text[0].removeprefix("error: ")


def test_run_is_analysed_compressed_and_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mmtune.tasks.tasks", lambda: {"pairs": PairTask})
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "small.yaml"
    config.write_text(CONFIG.replace("NAME", "open_clip"))
    assert cli.main(["train", str(config)]) == cli.OK
    run = tmp_path / "runs" / "small"
    capsys.readouterr()
    assert cli.main(["analyze", str(run), "--budgets", "1", "--starts", "2"]) == cli.OK
    shown = capsys.readouterr().out
    assert "||dW|| in vision" in shown
    assert "spectrum of the stacks" in shown
    looks_right(run / "analysis" / "analysis.html", tmp_path)
    out = tmp_path / "squeezed"
    # Four updates of rank 2 of each shape are a sum of eight components.
    arguments = ["compress", str(run), "--rank", "8", "--starts", "2", "--out", str(out)]
    assert cli.main(arguments) == cli.OK
    record = json.loads((out / "compression.json").read_text())
    shown = capsys.readouterr().out
    assert f"{record['before']:,} parameters before, {record['after']:,} after" in shown
    assert record["error"] < 1e-4
    assert cli.main(["eval", str(run)]) == cli.OK
    with_lora = capsys.readouterr().out.splitlines()[1:]
    assert cli.main(["eval", str(config), "--adapter", str(out)]) == cli.OK
    with_aurora = capsys.readouterr().out.splitlines()[1:]
    assert with_aurora[-2:] == with_lora[-2:]
    assert cli.main(["eval", str(config)]) == cli.OK
    assert capsys.readouterr().out.splitlines()[1:][-2:] != with_lora[-2:]


def test_folders_that_hold_no_updates(tmp_path, adapter, capsys):
    run = made.run(tmp_path / "run", made.wrap(made.lora()))
    said = refusal(capsys, "analyze", str(tmp_path))
    assert "neither a run (no config.yaml) nor an adapter" in said
    (RunFolder(run).adapter).rename(tmp_path / "moved")
    assert "adapter is missing" in refusal(capsys, "analyze", str(run))
    assert "--base MODEL" in refusal(capsys, "analyze", str(adapter))
    assert "--base MODEL" in refusal(capsys, "analyze", "--tuned", "x", "--out", str(tmp_path))
    assert "name one of the two" in refusal(capsys, "analyze", str(run), "--tuned", "x")
    assert "needs --out" in refusal(capsys, "analyze", "--tuned", "x", "--base", "y")
    assert "neither a run nor an adapter folder needs --out" in refusal(capsys, "analyze")
    empty = tmp_path / "empty"
    empty.mkdir()
    said = refusal(
        capsys, "analyze", "--tuned", str(empty), "--base", "test:clip", "--out", str(tmp_path)
    )
    assert "holds no model" in said


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bitfit", {}),
        ("adapter", {"bottleneck": 4}),
        ("prompt", {"tokens": 3}),
        ("prefix", {"tokens": 3, "bottleneck": 8}),
        ("unipelt", {"tokens": 3}),
    ],
)
def test_methods_that_add_nothing_to_weights(name, options, tmp_path, capsys):
    run = made.run(tmp_path / "run", made.wrap(made.method(name, **options)), method=name)
    said = refusal(capsys, "analyze", str(run))
    assert f"holds {name.upper()}, which adds nothing to weights" in said
    out = str(tmp_path / "out")
    assert said in refusal(capsys, "compress", str(run), "--rank", "2", "--out", out)
    assert not (run / "analysis").exists()


def test_dora_is_refused(tmp_path, capsys):
    from mmtune import lora_config

    def dora(model):
        config = lora_config(model, rank=2)
        config.use_dora = True
        return config

    folder = made.save(made.wrap(dora), tmp_path / "adapter")
    assert "DoRA" in refusal(capsys, "analyze", str(folder), "--base", "test:open_clip")


def test_settings_that_make_no_sense(tmp_path, adapter, capsys):
    base = ("--base", "test:open_clip")
    out = ("--out", str(tmp_path / "out"))
    compress = ("compress", str(adapter), *base, *out)
    assert "rank must be at least 1, got 0" in refusal(capsys, *compress, "--rank", "0")
    assert "starts must be at least 1" in refusal(capsys, *compress, "--rank=2", "--starts=0")
    analyze = ("analyze", str(adapter), *base)
    assert "starts must be at least 1" in refusal(capsys, *analyze, "--starts", "0")
    assert "budgets must be positive, got 0.0" in refusal(capsys, *analyze, "--budgets", "0")
    taken = ("compress", str(adapter), *base, "--rank", "2", "--out", str(adapter))
    assert "exists already" in refusal(capsys, *taken)


def test_models_that_do_not_fit(tmp_path, adapter, capsys, monkeypatch):
    out = ("--out", str(tmp_path / "out"))
    said = refusal(capsys, "analyze", str(adapter), "--base", "test:clip", *out)
    assert "made for another backbone" in said
    monkeypatch.setattr("mmtune.analysis.sources._model_name", lambda name: name)
    tuned = ("analyze", "--base", "test:open_clip", *out, "--tuned")
    assert "must be of one class and size" in refusal(capsys, *tuned, "test:clip")
    assert "must be of one class and size" in refusal(capsys, *tuned, "test:open_clip-fused")
    assert "no Linear of test:open_clip differs" in refusal(capsys, *tuned, "test:open_clip")


def test_two_models_are_analysed(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["analyze", "--base", "test:clip", "--tuned", "test:clip/1", "--out", str(out)]
    assert cli.main([*arguments, "--budgets", "0.1", "--starts", "1"]) == cli.OK
    assert "too few" in capsys.readouterr().out
    records = [json.loads(line) for line in (out / "analysis.jsonl").read_text().splitlines()]
    first, second = (made.load(name).model for name in ("test:clip", "test:clip/1"))
    weights = dict(first.named_parameters())
    want = {
        name: torch.dist(p, weights[name])
        for name, p in second.named_parameters()
        if "q_proj" in name
    }
    modes = [mode for r in records if r["kind"] == "stack" for mode in r["modes"]]
    found = {f"{m['block']['path']}.weight": m["norm"] for m in modes if m["block"]["role"] == "q"}
    for name, norm in found.items():
        assert norm == pytest.approx(float(want[name]), rel=1e-5)
