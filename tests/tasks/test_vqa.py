"""VQA: the weighted loss, answers written and ranked, scores, submissions, and bad input."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mmtune.backbones.generation import log_probabilities
from mmtune.backbones.loading import hf_loaded
from mmtune.cli import main
from mmtune.config import load_config
from mmtune.data import DataError, DataOptions, SourceOptions
from mmtune.tasks import tasks
from mmtune.tasks.answer_ranking import AnswerRanker
from mmtune.tasks.language import text_losses
from mmtune.tasks.vqa import VqaOptions, VqaTask, read_answers
from tests.backbones.writers import writer
from tests.tasks.shapes import WORDS, loaded, question_data
from tests.tasks.tiny import tiny_loaded

PLAIN = {"augment": None, "resamples": 100}
ANSWERS = ["red", "green", "blue", "grey", "circle", "square", "yes", "no", "a large circle", "a"]


def make_task(folder, model=None, data=None, **options):
    data = data or question_data(folder)
    settings = VqaOptions(**PLAIN, **options)
    return VqaTask(settings, data, model or loaded(), 0, progress=False)


def batch_of(task, indices):
    return task.collate([task.train_dataset[i] for i in indices])


def fitted(task, steps, size=24, lr=5e-3):
    """The task's model with LoRA on every Linear, trained; and its losses."""
    torch.manual_seed(0)
    task.loaded.backbone.prepare()
    config = LoraConfig(target_modules="all-linear", r=8, lora_alpha=16)
    model = get_peft_model(task.loaded.model, config)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    samples = [task.train_dataset[i] for i in range(len(task.train_dataset))]
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        chosen = torch.randperm(len(samples), generator=generator)[:size].tolist()
        loss, _ = task.loss(model, task.collate([samples[i] for i in chosen]))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return model, losses


def test_drawn_shapes_are_learned_and_the_gallery_shows_it(tmp_path):
    assert tasks()["vqa"] is VqaTask
    task = make_task(tmp_path)
    before = task.evaluate(task.loaded.model, progress=False)
    model, losses = fitted(task, steps=110)
    model.train()
    after = task.evaluate(model, progress=False)
    assert model.training
    assert losses[-1] < losses[0] / 10
    kinds = ["accuracy (colour)", "accuracy (shape)", "accuracy (yes/no)"]
    assert list(after.metrics) == ["accuracy", "exact match", *kinds]
    assert after.primary == "accuracy"
    assert [after.metrics[k].n for k in after.metrics] == [48, 48, 16, 16, 16]
    assert after.metrics["accuracy"].value >= 90
    gain = task.compare(before, after)["accuracy"]
    values = [e.metrics["accuracy"].value for e in (before, after)]
    assert gain.value == pytest.approx(values[1] - values[0])
    assert gain.low > 50
    shown = task.gallery(before, after, limit=6)
    assert len(shown) == 6
    for item in shown:
        assert item.title.startswith("accuracy ")
        assert item.query.image.size == (32, 32)
        assert (item.before[0].correct, item.after[0].correct) == (False, True)
        assert item.after[0].text in item.query.text
    back = task.gallery(after, before, limit=6)
    assert [i.before[0].correct for i in back] == [True] * 6


def test_the_loss_is_the_weighted_sum_over_answers_each_scored_alone(tmp_path):
    task = make_task(tmp_path)
    chosen = [0, 1, 5, 4]  # 1 and 4 have two answers
    asked = []
    hook = task.loaded.model.text_encoder.register_forward_hook(
        lambda module, args, kwargs, out: asked.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with torch.no_grad():
        found, _ = task.loss(task.loaded.model, batch_of(task, chosen))
    hook.remove()
    assert asked == [4]  # each question is read once
    total = 0.0
    for index in chosen:
        question = task.train_dataset.questions[index]
        for answer in set(question.answers):
            share = question.answers.count(answer) / len(question.answers)
            batch = batch_of(task, [index])
            one = task.writer.targets(task.loaded.tokenizer, [answer])
            with torch.no_grad():
                logits = task.writer.target_logits(
                    task.loaded.model, batch | one | {"owner": torch.tensor([0])}
                )
            total -= share * float(log_probabilities(logits, *one.values()).sum())
    assert found.item() == pytest.approx(total / 4, rel=1e-5)


def test_weights_of_data_sets(tmp_path):
    data = question_data(tmp_path)
    path = tmp_path / "blip_vqa.json"
    entries = json.loads(path.read_text())
    for entry in entries[:2]:
        entry["dataset"] = "vg"
    path.write_text(json.dumps(entries))
    task = make_task(tmp_path, data=data, dataset_weights={"vg": 0.2})
    weights = batch_of(task, [0, 1, 2])["weights"]
    torch.testing.assert_close(weights, torch.tensor([0.2, 0.16, 0.04, 1.0]))


def test_the_gradient_of_the_weighted_loss():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 4, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    ids = torch.randint(7, (3, 4), generator=generator)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    weights = torch.tensor([0.7, 0.3, 1.0], dtype=torch.float64)
    for smoothing in (0.0, 0.1):
        torch.autograd.gradcheck(
            lambda x, s=smoothing: (weights * text_losses(x, ids, mask, s)).sum() / 2, logits
        )
    logs = logits.log_softmax(-1)
    want = -0.9 * logs.gather(-1, ids[..., None])[..., 0] - 0.1 * logs.mean(-1)
    torch.testing.assert_close(text_losses(logits, ids, mask, 0.1), (want * mask).sum(1))


def test_a_gradient_through_the_model_is_that_of_finite_differences(tmp_path):
    task = make_task(tmp_path)
    task.loaded.model.double()
    config = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    task.loaded.backbone.prepare()
    model = get_peft_model(task.loaded.model, config, autocast_adapter_dtype=False).double()
    batch = batch_of(task, range(4))
    trained = [p for p in model.parameters() if p.requires_grad]
    loss, _ = task.loss(model, batch)
    gradients = torch.autograd.grad(loss, trained)
    generator = torch.Generator().manual_seed(3)
    way = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in trained]
    slope = sum((g * w).sum() for g, w in zip(gradients, way, strict=True))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, w in zip(trained, way, strict=True):
                p.add_(sign * 1e-6 * w)
            values.append(task.loss(model, batch)[0])
            for p, w in zip(trained, way, strict=True):
                p.sub_(sign * 1e-6 * w)
    torch.testing.assert_close((values[0] - values[1]) / 2e-6, slope, rtol=1e-6, atol=1e-7)


def ranked(task, model, answers, questions, **settings):
    ranker = AnswerRanker(task.writer, task.loaded.tokenizer, answers, **settings)
    pixels = torch.stack([task.eval_pixels(q.image) for q in questions])
    with torch.no_grad():
        return ranker.best(model, {"pixel_values": pixels, **task.prompts(questions)})


def test_ranking_finds_the_most_likely_answer_whatever_the_batch(tmp_path):
    task = make_task(tmp_path)
    model, _ = fitted(task, steps=12)
    model.eval()
    questions = task.splits["test"].records[:12]
    scores = torch.zeros(12, len(ANSWERS))
    for i, question in enumerate(questions):
        batch = {"pixel_values": task.eval_pixels(question.image)[None], **task.prompts([question])}
        for j, answer in enumerate(ANSWERS):
            one = task.writer.targets(task.loaded.tokenizer, [answer])
            with torch.no_grad():
                logits = task.writer.target_logits(
                    model, batch | one | {"owner": torch.tensor([0])}
                )
            scores[i, j] = log_probabilities(logits, *one.values()).sum()
    want = [ANSWERS[j] for j in scores.argmax(1).tolist()]
    assert len(set(want)) > 1
    for settings in ({}, {"rows": 7}, {"candidates": len(ANSWERS)}, {"candidates": 99}):
        assert ranked(task, model, ANSWERS, questions, **settings) == want
    # The most likely first token alone: its answers, of which the whole text decides.
    first = torch.zeros(12, len(ANSWERS))
    ids = task.writer.targets(task.loaded.tokenizer, ANSWERS)["target_ids"][:, 0]
    pixels = torch.stack([task.eval_pixels(q.image) for q in questions])
    batch = {"pixel_values": pixels, **task.prompts(questions)}
    one = {"target_ids": ids[:1].expand(12, 1), "target_mask": torch.ones(12, 1).long()}
    with torch.no_grad():
        logits = task.writer.target_logits(model, batch | one | {"owner": torch.arange(12)})
    first = logits[:, 0][:, ids]
    two = first.argsort(dim=1, descending=True, stable=True)[:, :2].sort(1).values
    best = two.gather(1, scores.gather(1, two).argmax(1, keepdim=True))[:, 0]
    found = ranked(task, model, ANSWERS, questions, candidates=2)
    assert found == [ANSWERS[j] for j in best.tolist()]


def test_ranking_takes_the_training_answers_or_those_of_a_file(tmp_path):
    task = make_task(tmp_path, inference="rank")
    assert task._ranker.answers[0] == "circle"  # 8 annotators of each of 8 pictures
    assert set(task._ranker.answers) >= {"red", "yes", "square", "small"}
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(ANSWERS))
    found = make_task(tmp_path, inference="rank", answer_list=str(path))
    given = {
        p["answer"]
        for p in found.evaluate(found.loaded.model, progress=False).details["predictions"]
    }
    assert given <= set(ANSWERS)
    (tmp_path / "answers.txt").write_text("red\n\n yes \nred\n")
    assert read_answers(str(tmp_path / "answers.txt")) == ["red", "yes"]
    assert VqaTask.reads(VqaOptions(inference="rank"), "test") == ("test", "train")
    assert VqaTask.reads(VqaOptions(), "test") == ("test",)
    with pytest.raises(DataError, match=r"needs task\.answer_list"):
        make_task(tmp_path, data=DataOptions(test=question_data(tmp_path).test), inference="rank")


def test_a_list_without_the_answers_is_named_and_counted(tmp_path, caplog):
    path = tmp_path / "answers.txt"
    path.write_text("red\nyes\nno\ncircle\nsquare\n")
    options = {"inference": "rank", "answer_list": str(path)}
    with caplog.at_level(logging.WARNING):
        make_task(tmp_path, **options)
    assert "lacks every answer to 12 of 48 questions" in caplog.text
    assert "record 6: answer not in the list: 'what colour is it': ['green']" in caplog.text
    with pytest.raises(DataError, match="24 answer not in the list"):  # of val and test
        make_task(tmp_path, missing_answers="raise", **options)


def test_evaluation_does_not_depend_on_batches_or_on_preparation(tmp_path):
    one = make_task(tmp_path)
    stock = one.evaluate(one.loaded.model, progress=False)
    small = make_task(tmp_path, eval_batch_size=5)
    small.loaded.backbone.prepare()
    found = small.evaluate(small.loaded.model, progress=False)
    assert found.details["predictions"] == stock.details["predictions"]
    assert found.metrics == stock.metrics


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "llava", "mistral"])
def test_multimodal_language_models_are_trained_and_answer(name, tmp_path):
    model, view, tokenizer = writer(name)
    with torch.no_grad():  # a fresh head says next to nothing, whatever it is given
        head = view.select(["language"], ["head"])[0].module.weight
        head.div_(head.std())
    words = {w: f"w{i}" for i, w in enumerate(WORDS, start=3)}
    known = hf_loaded(model, tokenizer, loaded().image, name)
    data = question_data(tmp_path)
    path = tmp_path / "blip_vqa.json"
    entries = json.loads(path.read_text())
    for entry in entries:
        entry["question"] = " ".join(words[w] for w in entry["question"].split())
        given = entry["answer"]
        entry["answer"] = [words[a] for a in ([given] if isinstance(given, str) else given)]
    path.write_text(json.dumps(entries))
    template = {"llava": "w30 <image> {question} w31", "mistral": "<image> {question}"}
    task = make_task(tmp_path, known, data, prompt=template.get(name, "w30 {question} w31"))
    _, losses = fitted(task, steps=40, size=12, lr=1e-2)
    assert losses[-1] < losses[0] / 2
    evaluation = task.evaluate(task.loaded.model, progress=False)
    assert evaluation.metrics["accuracy"].value > 20


def test_models_that_do_not_write_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is a CLIPModel"):
        make_task(tmp_path, tiny_loaded())
    with pytest.raises(ValueError, match="is a BlipForImageTextRetrieval"):
        make_task(tmp_path, loaded("retrieval"))


def test_options_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"must hold \{question\}"):
        VqaOptions(prompt="what?")
    with pytest.raises(ValueError, match="is for inference: rank"):
        VqaOptions(answer_list="a.txt")


@pytest.fixture
def run(tmp_path):
    """A config, its model and data as files."""
    from transformers import BlipImageProcessor

    question_data(tmp_path)
    known, folder = loaded(), tmp_path / "model"
    known.model.save_pretrained(folder)
    known.tokenizer.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    BlipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    source = {"format": "blip_vqa", "path": str(tmp_path / "blip_vqa.json")}
    config = {
        "name": "tiny",
        "model": {"name": f"hf:{folder}"},
        "task": {"name": "vqa", **PLAIN},
        "data": {"train": source, "test": source},
        "tuner": {"method": "aurora", "rank": 4},
        "training": {"max_steps": 2, "batch_size": 8, "device": "cpu"},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(config))
    return path


def test_a_run_from_the_command_line_and_its_submission(run, tmp_path, capsys):
    runs = tmp_path / "runs"
    assert main(["train", str(run), "--runs", str(runs)]) == 0
    report = (runs / "tiny" / "report.md").read_text()
    assert "accuracy (colour)" in report
    file = tmp_path / "out" / "answers.json"
    assert main(["eval", str(runs / "tiny"), "--predictions", str(file)]) == 0
    assert "48 predictions" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert [set(p) for p in found] == [{"question_id", "answer"}] * 48
    assert [p["question_id"] for p in found] == list(range(48))
    assert not list(file.parent.glob(".*"))


def test_hidden_answers_are_predicted_and_not_scored(run, tmp_path, capsys):
    path = tmp_path / "blip_vqa.json"
    entries = json.loads(path.read_text())
    hidden = tmp_path / "hidden.json"
    hidden.write_text(json.dumps([{k: v for k, v in e.items() if k != "answer"} for e in entries]))
    config = load_config(run)
    assert config.data.test == SourceOptions("blip_vqa", str(path))
    file = tmp_path / "answers.json"
    arguments = ["eval", str(run), f"data.test.path={hidden}", "--predictions", str(file)]
    assert main(arguments) == 0
    assert len(json.loads(file.read_text())) == 48
    assert "accuracy" not in capsys.readouterr().out
    assert main(["eval", str(run), f"data.train.path={hidden}", "--split", "train"]) == 2
    assert "48 question without answers" in capsys.readouterr().err
