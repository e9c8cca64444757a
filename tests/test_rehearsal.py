"""Dry runs, memory estimates and rehearsals, on architectures of real shape and tiny size."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image

from mmtune import cli
from mmtune.backbones import architectures, blip_checkpoints
from mmtune.backbones.architectures import architecture, blip_config
from mmtune.config import config_names, load_config
from mmtune.data.checking import check
from mmtune.data.options import SourceOptions
from mmtune.data.readers import read
from mmtune.data.records import DataError, Question, Record, VideoFile
from mmtune.finetuning import wrap
from mmtune.memory import LiveBytes
from mmtune.rehearsal import DATA, memory_of, rehearse, stand_in
from mmtune.tasks import tasks
from tests.backbones import original_blip

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 128}
KINDS = {"blip_retrieval": "retrieval", "blip_video_retrieval": "retrieval"}
KINDS |= {"vqa": "vqa", "video_qa": "vqa", "captioning": "caption"}
CONFIG = """\
name: small
model: {{name: "{model}"}}
task: {{name: {task}{options}}}
data:
  train: {{format: {format}, path: {path}, images: pictures}}
  test: {{format: {format}, path: {path}, images: pictures}}
tuner: {{method: aurora, rank: 4}}
training: {{epochs: 2, batch_size: {batch}, lr: 1e-3, device: cpu{training}}}
"""


@pytest.fixture(autouse=True)
def _small(monkeypatch, tmp_path):
    torch.set_num_threads(1)
    for kind in ("retrieval", "vqa", "caption"):
        known = architecture(f"blip-base-{kind}-32")
        vision = {**SMALL, "image_size": 32, "patch_size": 16}
        tiny = replace(known, config=partial(blip_config, kind, vision, SMALL, 16))
        monkeypatch.setitem(architectures.ARCHITECTURES, f"tiny-{kind}", lambda tiny=tiny: tiny)
    known = architecture("clip-vit-base-patch16")
    config = partial(
        architectures._clip_config, {**SMALL, "image_size": 32, "patch_size": 16}, SMALL, 16
    )
    tiny = replace(known, config=config, image=replace(known.image, size=32))
    monkeypatch.setitem(architectures.ARCHITECTURES, "tiny-clip", lambda: tiny)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def write_config(task, **settings):
    defaults = {"options": "", "training": "", "format": "karpathy", "path": "none.json"}
    model = f"hf:./models/tiny-{KINDS.get(task, 'clip')}"
    text = CONFIG.format(**{"task": task, "model": model, "batch": 4} | defaults | settings)
    with open("small.yaml", "w", encoding="utf-8") as file:
        file.write(text)
    return load_config("small.yaml")


def small(folder, task, **settings):
    config = write_config(task, **settings)
    return stand_in(config, folder, config.training.batch_size)


class TestLiveBytes:
    def test_what_is_made_and_released(self):
        with LiveBytes() as bytes_:
            a = torch.ones(1000)
            b = a * 2
            assert (bytes_.live, bytes_.peak) == (8000, 8000)
            del a
            assert (bytes_.live, bytes_.peak) == (4000, 8000)
            view = b.view(10, 100).T
            b.add_(1)
            assert bytes_.live == 4000
            del b
            assert bytes_.live == 4000
            del view
            assert (bytes_.live, bytes_.peak) == (0, 8000)

    def test_a_chain_keeps_its_outputs_until_the_backward_pass_has_used_them(self):
        n, links = 5000, 6
        x = torch.randn(n, requires_grad=True)
        with LiveBytes() as bytes_:
            y = x
            for _ in range(links):
                y = y.tanh()  # tanh's gradient needs its output
            loss = y.sum()
            del y
            assert bytes_.live == 4 * n * links + 4
            loss.backward()
        # The outputs, one gradient more, and two scalars: the loss and its gradient.
        assert bytes_.peak == 4 * n * (links + 1) + 8
        assert bytes_.live == 4 * n + 4

    def test_a_number_that_is_read_from_nothing_is_one(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(), LiveBytes():
            assert torch.zeros(3).sum().item() == 1.0
            assert bool(torch.zeros(3).any())


@pytest.fixture
def _no_collection():
    """Tensors in reference cycles are released by chance otherwise."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collection")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("task", "precision"),
    [
        ("retrieval", "float32"),
        ("blip_retrieval", "bf16"),
        # In bf16 its peak lies in a layer norm of mixed dtypes, of whose statistics torch's fakes
        # say bf16 where the kernel makes float32.
        ("captioning", "float32"),
    ],
)
def test_estimate_is_what_a_real_step_takes(task, precision, checkpointing, tmp_path, monkeypatch):
    """The same step with numbers in it, counted storage by storage."""
    from mmtune import backbones
    from mmtune.device import checkpoint_activations

    more = f", precision: {precision}, gradient_checkpointing: {str(checkpointing).lower()}"
    config = small(tmp_path, task, training=more)
    found = memory_of(config)

    # transformers leaves a mask out where it can read that nothing is masked, and fakes it cannot.
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: True)
    loaded = backbones.load(config.model.name)
    objective = tasks()[task](config.task_options, config.data, loaded, 0)
    model, _ = wrap(config, loaded)
    batch = objective.collate([objective.train_dataset[i] for i in range(4)])
    weights = sum(t.nbytes for t in {*model.parameters(), *model.buffers()})
    trained = [p for p in model.parameters() if p.requires_grad]
    if checkpointing:
        checkpoint_activations(model)
    model.train()
    half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with LiveBytes() as live:
        objective.before_training(model)
        objective.set_epoch(0)
        hooks = objective.hooks(model, 1000)
        state = live.live
        hooks.before_step(1)
        with half:
            loss, _ = objective.loss(model, batch)
        loss.backward()
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    assert found.weights == weights
    assert found.optimizer == 2 * sum(p.nbytes for p in trained)
    assert found.state == state
    assert found.gradients == gradients
    inputs = sum(t.nbytes for t in batch.values())
    assert found.activations == live.peak - state - gradients + inputs
    assert found.activations > 20_000


def test_checkpointing_takes_less(tmp_path):
    def activations(training):
        config = small(tmp_path, "blip_retrieval", options=", queue: 8", training=training)
        return memory_of(config).activations

    assert activations(", gradient_checkpointing: true") < 0.8 * activations("")


def test_activations_of_images_grow_with_the_batch(tmp_path):
    def of(size):
        return memory_of(small(tmp_path, "captioning", batch=size))

    one, two, four = (of(size) for size in (2, 4, 8))
    assert one.weights == two.weights == four.weights
    assert 1.6 < two.activations / one.activations < 2.2
    assert 1.6 < four.activations / two.activations < 2.2


def test_four_bits_are_not_guessed_at(tmp_path):
    pytest.importorskip("bitsandbytes")
    config = small(tmp_path, "retrieval")
    other = load_config("small.yaml", ["tuner={method: qlora, rank: 2}"])
    found = memory_of(replace(config, method=other.method, tuner_options=other.tuner_options))
    assert "four bits" in found


@pytest.mark.parametrize("task", [name for name in DATA if name in tasks()])
def test_rehearsal_trains_and_measures(task, tmp_path):
    options = ", inference: rank, answer_list: answers.json" if task == "vqa" else ""
    if DATA[task].startswith("video"):
        options = ", frames: 2, eval_frames: 2"
    config = write_config(task, options=options, training=", workers: 0")
    record = tmp_path / "kept" / "rehearsals.jsonl"
    found = rehearse(config, 3, record)
    assert (found.steps, found.batch) == (3, 4)
    assert found.samples_per_second == pytest.approx(4 / found.step_seconds)
    assert found.first_loss > 0
    assert found.last_loss != found.first_loss
    assert 0 < found.trainable < found.total
    assert isinstance(found.estimate, int)
    line = json.loads(record.read_text())
    assert line["model"] == config.model.name.replace("hf:", "hf:random:")
    assert line["steps"] == 3
    assert line["manifest"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {p.name for p in tmp_path.iterdir()} == {"kept", "small.yaml"}


def test_every_full_size_recipe_has_made_up_data():
    names = [name for name in config_names() if name.startswith("train/")]
    assert {load_config(name).task for name in names} <= set(DATA)


def test_rehearsal_through_the_command_line(capsys):
    write_config("retrieval")
    assert cli.main(["rehearse", "small.yaml", "--steps", "2", "training.batch_size=3"]) == 0
    out = capsys.readouterr().out
    assert "2 of 3 samples" in out
    assert "runs/rehearsals.jsonl" in out
    assert cli.main(["rehearse", "small.yaml", "--steps", "1"]) == 0
    with open("runs/rehearsals.jsonl", encoding="utf-8") as file:
        assert [json.loads(line)["steps"] for line in file] == [2, 1]
    assert cli.main(["rehearse", "small.yaml", "--steps", "0"]) == 2
    assert "--steps must be at least 1" in capsys.readouterr().err


def test_rehearsal_is_of_one_process(tmp_path, monkeypatch):
    config = write_config("retrieval")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process, but 2 were started; start it by itself"):
        rehearse(config, 1, tmp_path / "rehearsals.jsonl")


class TestSynthetic:
    def source(self, name, tmp_path, limit=3):
        return SourceOptions("synthetic", str(tmp_path / "films"), name=name, limit=limit)

    @pytest.mark.parametrize("name", ["captions", "questions", "video_captions", "video_questions"])
    def test_records_follow_from_role_and_number(self, name, tmp_path):
        one = check(read(self.source(name, tmp_path)), progress=False).records
        two = list(read(self.source(name, tmp_path, 5)))
        assert len(one) == 3
        assert one == two[:3]
        assert one != list(read(self.source(name, tmp_path), "val"))
        assert isinstance(one[0], Question if name.endswith("questions") else Record)
        assert isinstance(one[0].image, VideoFile) == name.startswith("video")

    def test_questions_have_an_answer_that_most_give(self, tmp_path):
        for record in read(self.source("questions", tmp_path, 20)):
            assert len(record.answers) == 10
            assert max(map(record.answers.count, record.answers)) >= 7

    def test_videos_have_frames_without_pyav_too(self, tmp_path, monkeypatch):
        from mmtune.data.video import load_frames

        film = next(read(self.source("video_captions", tmp_path))).image
        assert film.name.endswith(".mp4")
        frames = load_frames(film, 8)
        monkeypatch.setattr("mmtune.data.readers.synthetic.find_spec", lambda name: None)
        film = next(read(self.source("video_captions", tmp_path))).image
        assert (tmp_path / "films" / film.name).is_dir()
        for one, other in zip(frames, load_frames(film, 8), strict=True):
            assert one.size == other.size == (320, 240)
            pixels = [torch.tensor(list(i.resize((8, 6)).tobytes())).float() for i in (one, other)]
            assert (pixels[0] - pixels[1]).abs().mean() < 12

    def test_unknown_kind_and_videos_without_a_folder(self):
        with pytest.raises(DataError, match="name must be one of captions"):
            next(read(SourceOptions("synthetic", name="caption")))
        with pytest.raises(DataError, match="a folder to write them to"):
            next(read(SourceOptions("synthetic", name="video_captions")))


class TestDryRun:
    def run(self, capsys, *overrides):
        code = cli.main(["train", "small.yaml", "--dry-run", *overrides])
        got = capsys.readouterr()
        return code, got.out, got.err

    def test_what_is_missing_is_named_and_the_rest_is_counted(self, capsys, tmp_path):
        config = write_config("vqa", options=", inference: rank, answer_list: list.json")
        code, out, err = self.run(capsys)
        assert code == 2
        for name in (
            "model.name: ./models/tiny-vqa (no such folder; `mmtune convert blip FILE",
            "data.train.path and 1 more: none.json (karpathy: no such file or folder; "
            "put it there, or set data.train.path)",
            "data.train.images and 1 more: pictures (",
            "task.answer_list: list.json (no such file; put it there, or set task.answer_list)",
        ):
            assert f"missing: {name}" in err
        assert err.count("missing: ") == 4
        assert "meta device" in out
        (tmp_path / "made").mkdir()
        assert f"{memory_of(stand_in(config, tmp_path / 'made', 4)).total / 2**30:.2f}" in out
        assert not (tmp_path / "runs").exists()

    def test_a_config_that_can_run_says_so(self, capsys, tmp_path):
        state = original_blip.original(original_blip.stock("retrieval"))
        state["text_encoder.embeddings.word_embeddings.weight"] = torch.randn(30524, 128)
        torch.save(state, "small.pth")
        architecture("blip-base-retrieval-32").tokenizer().save_pretrained("words")
        folder = tmp_path / "models" / "converted"
        _, problem = blip_checkpoints.write("small.pth", "retrieval", folder, None, "words")
        assert problem is None
        (tmp_path / "pictures").mkdir()
        images = []
        for number in range(6):
            Image.new("RGB", (40, 40), (40 * number, 0, 0)).save(f"pictures/{number}.png")
            sentence = {"raw": f"dog number {number}"}
            split = "train" if number < 5 else "test"
            images.append({"filename": f"{number}.png", "split": split, "sentences": [sentence]})
        (tmp_path / "data.json").write_text(json.dumps({"images": images}))
        write_config("blip_retrieval", model=f"hf:{folder}", path="data.json")
        code, out, err = self.run(capsys)
        assert (code, err.count("missing")) == (0, 0)
        assert "5 training samples, about 1 steps" in out
        assert "meta device" not in out

    def test_a_hub_name_that_nobody_knows_is_an_error(self, capsys):
        write_config("retrieval", model="hf:someone/unheard-of")
        code, _, err = self.run(capsys)
        assert code == 2
        assert "someone/unheard-of" in err

    def test_what_the_hub_has_is_fetched_by_the_run_itself(self, capsys):
        write_config(
            "retrieval", model="open_clip:ViT-B-32/openai", format="datasets", path="some/set"
        )
        code, out, err = self.run(
            capsys, "data.train.images=null", "data.test.images=null", "tuner.sites=[q]"
        )
        assert "missing" not in err
        rows = [line for line in out.splitlines() if "fetched" in line]
        assert ["open_clip:ViT-B-32/openai" in rows[0], "some/set" in rows[1]] == [True, True]
        assert code == 0
