"""The training loop of editors: resume to the bit, early stop, the best is kept, refusals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from editing.meta import checkpoints
from editing.meta.base import TrainedError, read_head
from editing.meta.training import train_editor
from editing.meta.weights import TrainedWeightOptions
from editing.regions import Region
from mmtune.checkpoints import TrainingError
from tests.editing.stub_editor import OPTIONS, RECORDS, VAL, Stub, trained
from tests.editing.tiny import bits, same_bits, tiny


class Killed(BaseException):
    """Ends a run where it stands."""


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def written(folder):
    """Everything that must be the same, however often the run was stopped."""
    network = load_file(folder / "trained" / "network.safetensors")
    last = load_file(folder / "checkpoints" / "checkpoint-13" / "network.safetensors")
    head = read_head(folder / "trained")
    return lines(folder), head, [t.numpy().tobytes() for t in (*network.values(), *last.values())]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, result) of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, trained(folder)


def stops_at(call):
    count = []

    def stop(*_):
        count.append(1)
        if len(count) == call:
            raise Killed

    return stop


@pytest.mark.parametrize("call", [1, 2, 9, 10, 11, 14, 23, 33])
def test_a_run_stopped_in_any_step_or_validation_goes_on_to_the_same_bits(call, tmp_path, whole):
    editor = Stub()
    editor.on_losses = stops_at(call)
    with pytest.raises(Killed):
        trained(tmp_path, editor=editor)
    result = trained(tmp_path, resume=True)
    assert written(tmp_path) == written(whole[0])
    assert (result.steps, result.best_step) == (whole[1].steps, whole[1].best_step)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_run_stopped_while_it_saves_goes_on_to_the_same_bits(call, tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "sync", stops_at(call))
        with pytest.raises(Killed):
            trained(tmp_path)
    trained(tmp_path, resume=True)
    assert written(tmp_path) == written(whole[0])


def test_a_process_killed_while_it_saves_goes_on_to_the_same_bits(tmp_path, whole):
    command = [sys.executable, "-m", "tests.editing.stub_editor", str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert any(name.startswith(".checkpoint-8.partial") for name in left)
    assert "checkpoint-4" in left
    trained(tmp_path, resume=True)
    assert written(tmp_path) == written(whole[0])
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")]


def test_resuming_twice_and_resuming_nothing(tmp_path, whole):
    for call in (12, 9):
        editor = Stub()
        editor.on_losses = stops_at(call)
        with pytest.raises(Killed):
            trained(tmp_path, resume=True, editor=editor)
    trained(tmp_path, resume=True)
    assert written(tmp_path) == written(whole[0])


def test_random_numbers_outside_are_left_alone(tmp_path, whole):
    torch.manual_seed(99)
    state = torch.get_rng_state()
    trained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert written(tmp_path) == written(whole[0])


def test_every_record_is_seen_once_an_epoch_in_an_order_of_its_own(tmp_path):
    seen = []
    editor = Stub()
    editor.on_losses = lambda _, network, records: (
        seen.append([r.id for r in records]) if network.training else None
    )
    trained(tmp_path, editor=editor, steps=6, accumulation=1, validate_every=6)
    first, second = ([i for batch in part for i in batch] for part in (seen[:3], seen[3:]))
    assert sorted(first) == sorted(second) == sorted(r.id for r in RECORDS)
    assert first != second
    assert [len(batch) for batch in seen] == [2, 2, 1, 2, 2, 1]


def test_lines_are_means_over_the_steps_since_the_last(tmp_path, whole):
    every = tmp_path / "every"
    trained(every, log_every=1)
    fine = [line for line in lines(every) if "loss" in line]
    coarse = [line for line in lines(whole[0]) if "loss" in line]
    assert [line["step"] for line in fine] == list(range(1, 14))
    assert [line["step"] for line in coarse] == [2, 4, 6, 8, 10, 12, 13]
    for line in coarse[:-1]:
        pair = fine[line["step"] - 2 : line["step"]]
        for key in ("loss", "loss_edit", "loss_image_locality", "grad_norm"):
            assert line[key] == pytest.approx(sum(one[key] for one in pair) / 2, rel=1e-12)
        parts = line["loss_edit"] + line["loss_image_locality"]
        assert line["loss"] == pytest.approx(parts, rel=1e-6)


def test_the_best_validation_is_what_is_kept(tmp_path):
    """Every validation after the first is worse, though the numbers go on to be learned."""
    editor = Stub()
    editor.upwards = 100.0
    result = trained(tmp_path, editor=editor, patience=0)
    found = [line for line in lines(tmp_path) if "eval_loss" in line]
    assert [line["step"] for line in found] == [3, 6, 9, 12, 13]
    assert (result.steps, result.best_step, result.stopped_early) == (13, 3, False)
    assert result.validation["loss"] == found[0]["eval_loss"] == min(f["eval_loss"] for f in found)
    seen = load_file(tmp_path / "trained" / "network.safetensors")["seen"]
    assert float(seen) == 10  # 6 batches of 5 records, two a batch
    assert read_head(tmp_path / "trained")["about"]["steps"] == 3


@pytest.mark.parametrize(("patience", "steps"), [(1, 6), (2, 9), (3, 12)])
def test_patience_ends_the_training(patience, steps, tmp_path):
    editor = Stub()
    editor.upwards = 100.0
    result = trained(tmp_path, editor=editor, patience=patience)
    assert (result.steps, result.best_step, result.stopped_early) == (steps, 3, True)
    again = trained(tmp_path, resume=True, editor=Stub(), patience=patience)
    assert (again.steps, again.best_step, again.stopped_early) == (steps, 3, True)


def test_patience_begins_anew_with_each_better_validation(tmp_path):
    result = trained(tmp_path, patience=1)
    found = [line["eval_loss"] for line in lines(tmp_path) if "eval_loss" in line]
    assert found == sorted(found, reverse=True)
    assert (result.steps, result.best_step, result.stopped_early) == (13, 13, False)


def test_only_the_newest_checkpoint_and_the_best_editor_stay(whole, tmp_path):
    left = sorted(path.name for path in (whole[0] / "checkpoints").iterdir())
    assert left == ["best-13", "checkpoint-13"]
    trained(tmp_path, save_every=0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["best-13"]


def test_validation_changes_nothing(tmp_path, whole):
    trained(tmp_path, validate_every=1)
    last = [
        load_file(f / "checkpoints/checkpoint-13/network.safetensors") for f in (tmp_path, whole[0])
    ]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_the_model_stays_as_it_is(tmp_path):
    mllm = tiny("llava")
    before = bits(mllm.model)
    train_editor(Stub(), mllm, RECORDS, VAL, OPTIONS, tmp_path, progress=False)
    assert same_bits(mllm.model, before)
    assert all(p.grad is None for p in mllm.model.parameters())


def test_refusals(tmp_path):
    def losing(**found):
        editor = Stub()
        editor.losses = lambda mllm, network, records, generator: {
            name: value + 0 * network.values.sum() for name, value in found.items()
        }
        return editor

    with pytest.raises(TrainingError, match=r"the loss edit is nan in step 1\. Lower training\.lr"):
        trained(tmp_path, editor=losing(edit=torch.tensor(float("nan"))))
    with pytest.raises(TrainingError, match="stub has no loss for made up, record"):
        trained(tmp_path, editor=losing())
    editor = Stub()
    editor.losses = lambda *_: {"edit": torch.tensor(1.0)}
    with pytest.raises(TrainingError, match=r"no loss of .* depends on what is trained: edit"):
        trained(tmp_path, editor=editor)
    with pytest.raises(TrainingError, match="expected records to validate on"):
        train_editor(Stub(), tiny("llava"), RECORDS, [], OPTIONS, tmp_path, progress=False)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    trained(tmp_path)
    (tmp_path / "checkpoints" / "checkpoint-13" / "network.safetensors").write_bytes(b"x")
    with pytest.raises(TrainingError, match=r"checkpoint-13 cannot be resumed from.*--overwrite"):
        trained(tmp_path, resume=True)


def test_a_trained_editor_is_known_by_its_folder(whole, tmp_path):
    mllm, folder = tiny("llava"), whole[0] / "trained"
    with pytest.raises(TrainedError, match=r"stub must be trained before it edits.*edit-train"):
        Stub().network(mllm)
    editor = Stub(TrainedWeightOptions(trained=str(folder)))
    network = editor.network(mllm)
    assert network is editor.network(mllm)
    assert not network.training
    assert float(network.seen) == 44  # 26 batches: 2, 2, 1 records, and again
    with pytest.raises(TrainedError, match=r"for tiny llava, and tiny blip2-opt is another model"):
        editor.network(tiny("blip2-opt"))
    with pytest.raises(TrainedError, match="has another dtype"):
        editor.network(tiny("llava", torch.bfloat16))
    other = tiny("llava")
    next(iter(editor.weights(other).values())).data[0, 0] += 1
    with pytest.raises(TrainedError, match="has other values"):
        editor.network(other)
    with pytest.raises(TrainedError, match=r"there is no editor\.json in it"):
        Stub(TrainedWeightOptions(trained=str(tmp_path)))


def test_settings_come_from_the_training(tmp_path):
    region = Region(("language",), ("fc2",), "last:1")
    mllm, options = tiny("llava"), TrainedWeightOptions(region=region)
    generator = torch.Generator().manual_seed(0)
    folder = str(tmp_path / "trained")
    Stub(options).save_trained(folder, Stub(options).begin(mllm, generator), mllm)
    for given in ({}, {"region": region}, {"seed": 7}):
        found = Stub(TrainedWeightOptions(trained=folder, **given)).settings
        assert (found.region, found.seed) == (region, given.get("seed", 0))
    with pytest.raises(TrainedError, match=r"was trained with region = .*fc2.*got 'vision'"):
        Stub(TrainedWeightOptions(trained=folder, region="vision"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"editor": "mend"}, "holds a trained mend, and stub was asked for"),
        ({"format": 2}, "has format 2, and this version reads 1"),
        ({"made_on": {}}, "cannot be read"),
        ({"settings": {"depth": 3}}, "has settings that stub does not have here"),
    ],
)
def test_a_folder_that_says_something_else_is_refused(change, message, whole, tmp_path):
    head = json.loads((whole[0] / "trained" / "editor.json").read_text())
    (tmp_path / "editor.json").write_text(json.dumps(head | change))
    with pytest.raises(TrainedError, match=message):
        Stub(TrainedWeightOptions(trained=str(tmp_path)))


def test_a_network_that_does_not_fit_is_refused(whole, tmp_path):
    head = (whole[0] / "trained" / "editor.json").read_text()
    (tmp_path / "editor.json").write_text(head)
    (tmp_path / "network.safetensors").write_bytes(b"cut")
    with pytest.raises(TrainedError, match="does not hold the network of stub"):
        Stub(TrainedWeightOptions(trained=str(tmp_path))).network(tiny("llava"))
