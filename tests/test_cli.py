"""The command line: whole runs on a tiny random CLIP, exit codes, messages."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch

from mmtune import cli
from mmtune.backbones import backbone_of
from mmtune.backbones.base import ImageSpec, Loaded
from mmtune.conformance import backbones as cases
from mmtune.tasks.base import Evaluation, GalleryItem, Metric, Shown, Task

CONFIG = """\
name: small
model: {name: "test:NAME"}
task: {name: pairs}
data:
  train: {format: parquet, path: made-up.parquet}
  val: {format: parquet, path: made-up.parquet}
  test: {format: parquet, path: made-up.parquet}
tuner: {method: lora, rank: 2}
training: {epochs: 2, batch_size: 4, lr: 1e-2, log_every: 1, save_every: 2, device: cpu}
"""


@dataclass(frozen=True)
class PairOptions:
    count: int = 9
    interrupt: bool = False


class Pairs(torch.utils.data.Dataset):
    def __init__(self, count):
        self.batch = cases.images_and_texts(3, count)

    def __len__(self):
        return len(self.batch["input_ids"])

    def __getitem__(self, index):
        return {name: value[index] for name, value in self.batch.items()}


class PairTask(Task):
    name = "pairs"
    summary = "match random pairs"
    options = PairOptions

    def __init__(self, options, data, loaded, seed):
        self.backbone, self.chosen = loaded.backbone, options
        self.train_dataset = Pairs(options.count)

    def set_epoch(self, epoch):
        if self.chosen.interrupt:
            raise KeyboardInterrupt

    def before_training(self, model):
        pass

    def collate(self, samples):
        return {name: torch.stack([s[name] for s in samples]) for name in samples[0]}

    def loss(self, model, batch):
        pairs = self.backbone.embed_pairs(model, batch)
        logits = pairs.scale * pairs.image @ pairs.text.T
        return torch.nn.functional.cross_entropy(logits, torch.arange(len(logits))), {}

    def evaluate(self, model, split="test", progress=True):
        was = model.training
        model.eval()
        with torch.no_grad():
            pairs = self.backbone.embed_pairs(model, self.train_dataset.batch)
        model.train(was)
        value = float((pairs.image * pairs.text).sum(1).mean()) * 100
        return Evaluation({"cosine": Metric(value, value - 1, value + 1, 9)}, "cosine")

    def compare(self, before, after):
        value = after.metrics["cosine"].value - before.metrics["cosine"].value
        return {"cosine": Metric(value, value - 1, value + 1, 9)}

    def gallery(self, before, after, limit=12):
        return [GalleryItem("one", Shown(text="query"), [Shown(text="a", correct=False)], [])]


def load(name, dtype="float32"):
    model = cases.build(name.partition(":")[2])

    def tokenize(texts):
        return {"input_ids": cases.images_and_texts(0, len(texts))["input_ids"]}

    spec = ImageSpec(cases.IMAGE, (0.5,) * 3, (0.5,) * 3)
    return Loaded(model, backbone_of(model), spec, tokenize, cases.CONTEXT, name, len)


@pytest.fixture(autouse=True)
def _small(monkeypatch, tmp_path):
    torch.set_num_threads(1)
    monkeypatch.setattr("mmtune.tasks.tasks", lambda: {"pairs": PairTask})
    monkeypatch.setattr("mmtune.backbones.load", load)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=["open_clip", "clip"])
def config(request, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG.replace("NAME", request.param))
    return str(path)


@pytest.fixture
def one(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG.replace("NAME", "open_clip"))
    return str(path)


def test_train_eval_merge(config, tmp_path, capsys):
    assert cli.main(["train", config]) == 0
    out = capsys.readouterr().out
    assert "cosine" in out
    assert "trainable parameters: " in out
    folder = tmp_path / "runs" / "small"
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "config.yaml", "manifest.json", "metrics.jsonl", "adapter", "checkpoints", "results.json",
        "report.html", "report.md",
    }  # fmt: skip
    results = json.loads((folder / "results.json").read_text())
    assert results["difference"]["cosine"]["value"] > 0
    assert results["steps"] == 4
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4
    assert json.loads((folder / "manifest.json").read_text())["seed"] == 0

    assert cli.main(["eval", "runs/small"]) == 0
    assert f"{results['after']['cosine']['value']:.1f} [" in capsys.readouterr().out
    assert cli.main(["eval", config]) == 0
    assert f"{results['before']['cosine']['value']:.1f} [" in capsys.readouterr().out

    assert cli.main(["merge", "runs/small", "--out", "merged"]) == 0
    assert "relative" in capsys.readouterr().out
    assert list((tmp_path / "merged").glob("*.safetensors"))
    assert cli.main(["merge", "runs/small", "--out", "merged"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_finished_run_is_not_overwritten_silently(one, capsys, tmp_path):
    assert cli.main(["train", one]) == 0
    before = (tmp_path / "runs/small/results.json").read_bytes()
    assert cli.main(["train", one]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "runs/small/results.json").read_bytes() == before
    assert cli.main(["train", one, "--overwrite", "training.epochs=1"]) == 0
    assert cli.main(["train", one, "name=other", "training.epochs=1"]) == 0
    assert (tmp_path / "runs/other/results.json").exists()


def test_same_seed_gives_the_same_adapter(one, tmp_path):
    for name in ("a", "b", "c"):
        seed = "seed=1" if name == "c" else "seed=0"
        assert cli.main(["train", one, f"name={name}", seed]) == 0
    a, b, c = (
        (tmp_path / "runs" / name / "adapter/adapter_model.safetensors").read_bytes()
        for name in "abc"
    )
    assert a == b
    assert a != c


def test_interrupt_says_how_to_go_on_and_resume_does(one, capsys, tmp_path):
    assert cli.main(["train", one, "task.interrupt=true"]) == 130
    err = capsys.readouterr().err
    assert "--resume goes on with it" in err
    assert cli.main(["train", one, "--resume"]) == 2
    assert "interrupt: true -> interrupt: false" in capsys.readouterr().err
    saved = tmp_path / "runs/small/config.yaml"
    saved.write_text(saved.read_text().replace("interrupt: true", "interrupt: false"))
    assert cli.main(["train", one, "--resume"]) == 0


def test_recomputed_activations_change_nothing_and_bf16_trains(config, tmp_path):
    assert cli.main(["train", config, "name=plain"]) == 0
    assert cli.main(["train", config, "name=again", "training.gradient_checkpointing=true"]) == 0
    one, other = (
        (tmp_path / "runs" / name / "metrics.jsonl").read_text() for name in ("plain", "again")
    )
    assert one == other
    assert cli.main(["train", config, "name=half", "training.precision=bf16"]) == 0
    results = json.loads((tmp_path / "runs/half/results.json").read_text())
    assert results["difference"]["cosine"]["value"] > 0


def test_best_epoch_is_kept(one, tmp_path):
    chosen = ["training.evaluate=epoch", "training.keep=best", "training.epochs=3"]
    assert cli.main(["train", one, *chosen]) == 0
    lines = (tmp_path / "runs/small/metrics.jsonl").read_text().splitlines()
    scores = [json.loads(x)["eval_cosine"] for x in lines if "eval_cosine" in x]
    results = json.loads((tmp_path / "runs/small/results.json").read_text())
    assert len(scores) == 3
    assert results["after"]["cosine"]["value"] == pytest.approx(max(scores), rel=1e-6)
    assert "validation cosine" in (tmp_path / "runs/small/report.html").read_text()


def test_dry_run_writes_nothing(one, capsys, tmp_path):
    assert cli.main(["train", one, "--dry-run"]) == 2
    assert "missing: data.train.path and 2 more: made-up.parquet" in capsys.readouterr().err
    (tmp_path / "made-up.parquet").touch()
    assert cli.main(["train", one, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "9 training samples" in out
    assert not (tmp_path / "runs").exists()


def test_params_add_up(config, capsys):
    assert cli.main(["params", config, "tuner.sites=[q]", "tuner.branches=[vision]"]) == 0
    out = capsys.readouterr().out
    layers, rank, inputs_and_outputs = 2, 2, 2 * 48
    row = next(line for line in out.splitlines() if "vision" in line)
    assert row.strip("│ ").split("│")[-1].strip() == f"{layers * rank * inputs_and_outputs}"
    total = next(line for line in out.splitlines() if "trainable" in line)
    assert f" {layers * rank * inputs_and_outputs} " in total


def test_three_mistakes_exit_2_without_traceback(one, capsys):
    assert cli.main(["train", one, "tuner.rnak=3", "training.lr=x", "training.schedule=cos"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: 3 mistakes in the config:")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "no/such.yaml"], "no such config file"),
        (["eval", "."], "no finished run"),
        (["merge", "missing", "--out", "x"], "no finished run"),
        (["train", "small.yaml", "training.batch_size=100"], "training.batch_size"),
        (["train", "small.yaml", "data.test=null"], "data.test must be set"),
        (
            ["train", "small.yaml", "data.val=null", "training.evaluate=epoch"],
            "data.val must be set",
        ),
        (["train", "small.yaml", "tuner.sites=[nonsense]"], "no site 'nonsense'"),
        (["eval", "small.yaml", "--adapter", "missing"], "missing"),
    ],
)
def test_user_errors_exit_2_with_a_message(one, arguments, message, capsys):
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_adapter_of_another_rank_is_refused(one, capsys):
    assert cli.main(["train", one]) == 0
    assert cli.main(["train", one, "name=four", "tuner.rank=4"]) == 0
    text = "runs/small/config.yaml"
    assert cli.main(["eval", text, "--adapter", "runs/four/adapter"]) == 0
    wide = ["eval", "runs/small", 'model.name="test:clip"']
    assert cli.main(wide) == 2
    assert "another backbone" in capsys.readouterr().err


def test_debug_shows_the_traceback(one):
    with pytest.raises(ValueError, match="mistake"):
        cli.main(["--debug", "train", one, "training.lr=x"])


def test_bugs_are_not_dressed_up_as_user_errors(one, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(PairTask, "evaluate", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", one])


@pytest.mark.parametrize("what", ["backbones", "methods", "tasks", "configs"])
def test_lists(what, capsys):
    assert cli.main(["list", what]) == 0
    expected = {"backbones": "siglip", "methods": "aurora", "tasks": "pairs", "configs": "demo/"}
    assert expected[what] in capsys.readouterr().out


def test_help_answers_in_less_than_a_second_without_heavy_imports():
    code = (
        "import sys; from mmtune.cli import build_parser; build_parser().format_help();"
        "heavy = ('torch', 'transformers', 'peft', 'pydantic', 'rich');"
        "print([m for m in heavy if m in sys.modules])"
    )
    start = time.monotonic()
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert time.monotonic() - start < 1


def test_unknown_options_are_refused(one):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", one, "--overwrite", "--epochs=3"])
    assert caught.value.code == 2


def test_no_command_prints_help(capsys):
    assert cli.main([]) == 0
    assert "train" in capsys.readouterr().out


def test_matrix_is_the_list_that_the_suite_runs(capsys):
    from mmtune.conformance.backbones import BACKBONES
    from mmtune.conformance.methods import matrix, refusals

    assert cli.main(["list", "--matrix"]) == 0
    lines = [line.strip("│ ").split("│") for line in capsys.readouterr().out.splitlines()]
    wide = [line for line in lines if len(line) == 1 + len(BACKBONES)]
    cells = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in wide}
    for method, works in matrix().items():
        assert cells[method] == ["yes" if works[name] else "no" for name in BACKBONES]
    for row, backbone, _ in refusals():
        assert any(
            line[0].strip() == row and line[1].strip() == backbone
            for line in lines[1:]
            if len(line) > 1
        )


def test_list_of_nothing_says_what_there_is(capsys):
    assert cli.main(["list"]) == 2
    assert "backbones, methods, tasks, configs, editors, a method" in capsys.readouterr().err
