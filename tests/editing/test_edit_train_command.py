"""`mmtune edit-train`: its config, a whole run on a tiny model, what it writes and refuses."""

from __future__ import annotations

import io
import json
from itertools import chain

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

import editing.loading
from editing.meta.config import load_meta_config, to_yaml
from editing.meta.running import held_out
from editing.methods.base import editor
from editing.methods.ke import KeOptions
from editing.methods.mend import MendOptions
from mmtune import cli
from mmtune.checkpoints import TrainingError
from mmtune.yaml_source import ConfigError
from tests.editing.meta_records import random_records
from tests.editing.tiny import tiny
from tests.report.browser import looks_right

CONFIG = """\
name: small
seed: 3
model: {name: "hf:made-up"}
data:
  train: {path: DIR/records.json, images: DIR}
  held_out: 2
editor: {name: mend, rank: 4, rate: 1e-2, losses: {edit: 1.0}}
training:
  {steps: 2, batch_size: 2, accumulation: 1, lr: 1e-3, validate_every: 1, log_every: 1,
   save_every: 1}
"""


def item(record, number, folder):
    def stored(probe, name):
        file = f"{number}-{name}.png"
        Image.open(io.BytesIO(probe.image.data)).save(folder / file)
        return file

    request, near = record.request, record.image_locality[0]
    return {
        "src": request.question,
        "pred": "w3",
        "alt": request.target,
        "rephrase": record.text_generality[0].question,
        "image": stored(request, "seen"),
        "image_rephrase": stored(record.image_generality[0], "again"),
        "loc": record.text_locality[0].question,
        "loc_ans": record.text_locality[0].answer,
        "m_loc": stored(near, "near"),
        "m_loc_q": near.question,
        "m_loc_a": near.answer,
    }


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The path of a config whose model is a tiny llava, and whose records are six made-up ones."""
    items = [item(record, i, tmp_path) for i, record in enumerate(random_records(6))]
    (tmp_path / "records.json").write_text(json.dumps(items))
    file = tmp_path / "small.yaml"
    file.write_text(CONFIG.replace("DIR", str(tmp_path)))
    monkeypatch.setattr(editing.loading, "mllm_of", lambda options: tiny("llava"))
    monkeypatch.chdir(tmp_path)
    return str(file)


def test_a_run_writes_an_editor_that_edits(config, capsys, tmp_path):
    assert cli.main(["edit-train", config]) == cli.OK
    folder = tmp_path / "runs" / "small"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "manifest.json", "metrics.jsonl", "report.html", "results.json", "trained",
    }  # fmt: skip
    shown = capsys.readouterr().out
    for text in ("text generality", "success", "2 records of data.train were held out", "trained:"):
        assert text in shown
    results = json.loads((folder / "results.json").read_text())
    assert (results["editor"], results["steps"]) == ("mend", 2)
    assert results["best_step"] in (1, 2)
    page = (folder / "report.html").read_text()
    looks_right(folder / "report.html", tmp_path)
    for text in (
        "training loss",
        "validation loss",
        "edits that took",
        "validation: image locality",
    ):
        assert text in page
    manifest = json.loads((folder / "manifest.json").read_text())
    assert list(manifest["data"]) == [str(tmp_path / "records.json")]
    mend = editor("mend", MendOptions(trained=str(folder / "trained")))
    assert (mend.settings.rank, mend.settings.losses.edit) == (4, 1.0)
    edit = mend.edit(tiny("llava"), [random_records(1)[0].request])
    assert all(change.left.any() for change in edit.changes.values())
    assert load_meta_config(folder / "config.yaml") == load_meta_config(config)


def test_a_run_that_was_stopped_goes_on(config, monkeypatch, tmp_path, capsys):
    assert cli.main(["edit-train", config, "name=whole"]) == cli.OK

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("editing.meta.running._write", interrupted)
        assert cli.main(["edit-train", config]) == cli.INTERRUPTED
    assert cli.main(["edit-train", config]) == cli.USER_ERROR
    assert "--resume to go on" in capsys.readouterr().err
    assert cli.main(["edit-train", config, "--resume", "editor.rank=5"]) == cli.USER_ERROR
    assert "rank: 4 -> rank: 5" in capsys.readouterr().err
    assert cli.main(["edit-train", config, "--resume"]) == cli.OK
    whole, small = (
        load_file(tmp_path / "runs" / name / "trained" / "network.safetensors")
        for name in ("whole", "small")
    )
    assert all(whole[name].equal(small[name]) for name in whole)
    assert cli.main(["edit-train", config, "--resume"]) == cli.USER_ERROR
    assert "is finished" in capsys.readouterr().err


def test_validation_records_may_have_a_file_of_their_own(config, tmp_path, capsys):
    val = f"data.val={{path: {tmp_path}/records.json, images: {tmp_path}, limit: 1}}"
    arguments = [val, "training.steps=1", "training.batch_size=1"]
    assert cli.main(["edit-train", config, *arguments]) == cli.OK
    assert "held out" not in capsys.readouterr().out


def test_every_mistake_is_told_at_once(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(
        "name: small\nmodel: {name: x, dtype: int8}\ndata: {train: {pth: a}}\n"
        "editor: {name: mend, rnk: 4, rate: -1, losses: {edit: x}}\ntraining: {steps: 0, lr: -1}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_meta_config(file, ["sed=1"])
    keys = {mistake.key for mistake in caught.value.mistakes}
    assert keys == {
        "sed", "model.dtype", "data.train.pth", "data.train.path", "editor.rnk", "editor.rate",
        "editor.losses.edit", "training.steps", "training.lr",
    }  # fmt: skip
    assert "bad.yaml:4: editor.rnk: unknown key, got 4" in str(caught.value)
    assert "Did you mean" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{name: ft}", r"editor.name: expected an editor that is trained, .*ke.*mend.*; got 'ft'"),
        ("mend", "editor: expected an editor that is trained"),
        ("{name: mendd}", "Did you mean 'mend'"),
        ("{name: mend, trained: there}", "editor.trained: is what this command writes"),
        ("{name: mend, losses: {edit: 0, text_generality: 0, image_generality: 0, "
         "text_locality: 0, image_locality: 0}}", "at least one loss must have a weight above 0"),
    ],
)  # fmt: skip
def test_editors_that_are_refused(given, message, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(f"model: {{name: x}}\ndata: {{train: {{path: a}}}}\neditor: {given}\n")
    with pytest.raises(ConfigError, match=message):
        load_meta_config(file)


@pytest.mark.parametrize("options", [MendOptions(rank=3, sign="reference"), KeOptions(hidden=7)])
def test_a_config_reads_back(options, tmp_path, config):
    with open(config) as file:
        document = yaml.safe_load(file)
    name = {MendOptions: "mend", KeOptions: "ke"}[type(options)]
    shown = {"rank": 3, "sign": "reference"} if name == "mend" else {"hidden": 7}
    document["editor"] = {"name": name, **shown, "region": {"branches": ["language"]}}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(document))
    found = load_meta_config(tmp_path / "one.yaml")
    assert found.options.region.branches == ("language",)
    (tmp_path / "two.yaml").write_text(to_yaml(found))
    assert load_meta_config(tmp_path / "two.yaml") == found


def test_several_processes_are_refused(config, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["edit-train", config]) == cli.USER_ERROR
    assert "an editor is trained by one process" in capsys.readouterr().err


def test_images_held_out_are_not_trained_on():
    records = random_records(4)
    twins = list(chain.from_iterable((record, record) for record in records))
    for seed in range(5):
        train, val = held_out(twins, 3, seed)
        assert (len(train), len(val)) == (4, 4)  # two images, whole
        assert not {r.request.image for r in train} & {r.request.image for r in val}
    assert held_out(twins, 3, 1) == held_out(twins, 3, 1)
    assert len({held_out(twins, 1, seed)[1][0].id for seed in range(20)}) > 1
    with pytest.raises(TrainingError, match="8 records about 4 images: none is left"):
        held_out(twins, 7, 0)
