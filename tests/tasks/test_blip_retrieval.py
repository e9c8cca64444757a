"""Training BLIP for retrieval: what a step computes, and that it learns with every method."""

from __future__ import annotations

import logging
from copy import deepcopy

import pytest
import torch
from torch.nn import functional as F

from mmtune.backbones import unwrapped
from mmtune.tasks import tasks
from mmtune.tasks.blip_retrieval import BlipRetrievalOptions, BlipRetrievalTask
from mmtune.tasks.momentum import Bank
from tests.tasks.test_blip_retrieval_momentum import by_hand
from tests.tasks.tiny import colour_data, tiny_loaded
from tests.tasks.tiny_blip import (
    ENCODE,
    adapted,
    batch_of,
    make_task,
    tiny_blip,
    trained_parameters,
)

LOSSES = ("itc", "itm")
AURORA = {"rank": 8}
METHODS = {
    "lora": {"rank": 8},
    "aurora": AURORA,
    "aurora-batch": AURORA | {"context": "batch"},
    "aurora-reference": AURORA | {"context": "reference", "gate": "reference"},
    "prompt": {"tokens": 3},
}


def adapted_by(task, case, **more):
    return adapted(task, case.partition("-")[0], **METHODS[case], **more)


def train(task, model, steps, lr=1e-2, batches=None):
    """Plain steps as the trainer takes them; the numbers of each."""
    hooks = task.hooks(model, steps)
    optimiser = torch.optim.AdamW(trained_parameters(model).values(), lr=lr)
    model.train()
    order = torch.Generator().manual_seed(1)
    seen = []
    for step in range(1, steps + 1):
        hooks.before_step(step)
        indices = torch.randperm(16, generator=order)[:8].tolist() if batches is None else batches
        loss, numbers = task.loss(model, batch_of(task, indices))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        hooks.after_step(step)
        seen.append({name: float(value) for name, value in numbers.items()})
    return hooks, seen


def test_it_is_found_by_name_and_trains_the_heads_of_the_reference():
    assert tasks()["blip_retrieval"] is BlipRetrievalTask
    options = BlipRetrievalOptions()
    assert BlipRetrievalTask.heads(options, tiny_blip().backbone) == ["vision_proj", "itm_head"]


@pytest.mark.parametrize("case", METHODS)
def test_training_lowers_both_losses_and_keeps_the_base(tmp_path, case):
    task = make_task(tmp_path, rerank=0)
    model = adapted_by(task, case)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = trained_parameters(model)
    assert {n.split(".modules_to_save")[0].rpartition(".")[2] for n in trained if "_proj" in n} == {
        "vision_proj"
    }
    _, seen = train(task, model, 50, lr=3e-2, batches=[0, 5, 9, 14])
    # With a full queue; one positive in three makes 0.6365 what ignorance gets.
    itc, itm = ([sum(s[name] for s in seen[i : i + 5]) / 5 for i in (3, 45)] for name in LOSSES)
    assert itc[1] < itc[0] - 0.2
    assert itm[1] < 0.5
    assert all(s["negatives"] == 1 for s in seen)
    assert [s["alpha"] for s in seen[:6]] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])
    for name, value in frozen.items():
        assert torch.equal(model.get_parameter(name), value), name


@pytest.mark.parametrize("case", METHODS)
def test_every_trained_tensor_has_a_finite_gradient_in_the_second_step(tmp_path, case):
    task = make_task(tmp_path)
    model = adapted_by(task, case)
    train(task, model, 1)
    loss, _ = task.loss(model, batch_of(task, range(8)))
    loss.backward()
    for name, p in trained_parameters(model).items():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.abs().max() > 0, name


def step_by_hand(task, model, averaged, queue, batch, alpha, enhance):
    """ITC and ITM from the stock forward passes, pair by pair."""
    pixels, ids, mask = batch["pixel_values"], batch["input_ids"], batch["attention_mask"]

    def features(of):
        view = task.loaded.backbone
        groups = batch["groups"]
        return Bank(view.encode_image(of, pixels), view.encode_text(of, ids, mask), groups)

    with torch.no_grad():
        teacher = features(averaged)
    own, stock = features(model), unwrapped(model)
    temperature = task.settings.temperature
    itc = by_hand(own, teacher, queue.after(teacher), temperature, alpha)
    states = stock.vision_model(pixel_values=pixels).last_hidden_state
    encode = ids.clone()
    encode[:, 0] = ENCODE
    uniform = task._momentum.uniform(len(ids), 2)
    same = (batch["groups"][:, None] == batch["groups"][None]).any(2)
    fused, labels = [], []

    def read(image, text):
        return stock.text_encoder(
            input_ids=encode[[text]],
            attention_mask=mask[[text]],
            encoder_hidden_states=states[[image]],
        ).last_hidden_state[0, 0]

    n = len(ids)
    similar = own.image @ own.text.T
    for kind in range(3):
        for i in range(n):
            image = text = i
            if kind:
                row = (similar[i] if kind == 1 else similar[:, i]) / temperature
                chances = row.double().masked_fill(same[i], -torch.inf).softmax(0)
                drawn = int((chances.cumsum(0) <= uniform[i, kind - 1]).sum())
                image, text = (i, drawn) if kind == 1 else (drawn, i)
            fused.append(read(image, text))
            labels.append(int(kind == 0))
    classes = stock.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
    logits = stock.itm_head(enhance(torch.stack(fused), classes))
    return itc, F.cross_entropy(logits, torch.tensor(labels))


def enhancer(model, case):
    if not case.startswith("aurora-"):
        return lambda fused, classes: fused
    from mmtune.tuners.aurora.context import context_of

    context = context_of(model)
    if case == "aurora-batch":
        with torch.no_grad():
            context.alpha.fill_(0.7)
        return context.enhance
    return lambda fused, classes: torch.cat([fused[:8] + 0.1 * classes.mean(0), fused[8:]])


@pytest.mark.parametrize("case", METHODS)
def test_a_step_is_what_the_stock_parts_give_pair_by_pair(tmp_path, case):
    task = make_task(tmp_path)
    model = adapted_by(task, case)
    enhance = enhancer(model, case)
    hooks, _ = train(task, model, 4)
    averaged = deepcopy(model)
    for name, p in averaged.named_parameters():
        if p.requires_grad:
            p.data = hooks.encoder.averages[name].clone()
    batch = batch_of(task, [0, 1, 4, 7, 8, 9, 12, 15])
    queue = deepcopy(hooks.queue)
    hooks.before_step(5)
    itc, itm = step_by_hand(task, model, averaged, queue, batch, 0.4, enhance)
    loss, numbers = task.loss(model, batch)
    assert float(numbers["itc"]) == pytest.approx(itc.item(), rel=1e-5)
    assert float(numbers["itm"]) == pytest.approx(itm.item(), rel=1e-5)
    assert loss.item() == pytest.approx((itc + itm).item(), rel=1e-5)
    trained = list(trained_parameters(model).values())
    want = torch.autograd.grad(itc + itm, trained)
    for got, expected in zip(torch.autograd.grad(loss, trained), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
    kept = hooks.queue.kept
    assert torch.equal(kept.groups[torch.arange(32, 40) % 11], batch["groups"])
    with torch.no_grad():
        feature = task.loaded.backbone.encode_image(averaged, batch["pixel_values"])
    torch.testing.assert_close(kept.image[torch.arange(32, 40) % 11], feature)


def test_checkpointed_activations_give_the_same_step(tmp_path):
    results = []
    for checkpointed in (False, True):
        task = make_task(tmp_path)
        model = adapted_by(task, "aurora-reference")
        train(task, model, 3)
        if checkpointed:
            assert task.loaded.backbone.set_gradient_checkpointing()
        loss, _ = task.loss(model, batch_of(task, range(8)))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in trained_parameters(model).values())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_bf16_base_trains_and_its_averages_move(tmp_path):
    task = make_task(tmp_path, momentum=0.999)
    task.loaded.model.to(torch.bfloat16)
    model = adapted_by(task, "lora")
    start = {n: p.detach().clone() for n, p in trained_parameters(model).items()}
    hooks, seen = train(task, model, 12)
    assert seen[-1]["itc"] < seen[0]["itc"]
    for name, p in trained_parameters(model).items():
        average = hooks.encoder.averages[name]
        assert average.dtype == torch.float32
        moved = (average - start[name].float()).abs().max()
        assert 0 < moved < 0.05 * (p.detach().float() - start[name].float()).abs().max(), name


def test_texts_that_are_equal_match_unless_distinct(tmp_path):
    def captions(name):
        return ["a square", "A  square."] if "red" in name else [name, f"{name} again"]

    for identical, columns in (("positive", 2), ("distinct", 1)):
        task = make_task(tmp_path, captions, identical=identical)
        model = adapted_by(task, "lora")
        train(task, model, 1, batches=[0, 2, 4, 6])
        groups = task._momentum.queue.kept.groups
        assert groups.shape == (11, columns)
        # Captions of one image (0 and 1) match in either case.
        pair = batch_of(task, [0, 1])["groups"][:, :columns]
        assert (pair[0] == pair[1]).any()


def test_a_batch_without_negatives_trains_on_positives_and_says_so(tmp_path, caplog):
    task = make_task(tmp_path, lambda name: ["one text"])
    model = adapted_by(task, "lora")
    with caplog.at_level(logging.WARNING):
        _, seen = train(task, model, 2, batches=[0, 1, 2])
    assert [s["negatives"] for s in seen] == [0, 0]
    messages = [r.getMessage() for r in caplog.records if "hard negatives" in r.getMessage()]
    assert len(messages) == 1
    assert "its 3 pairs all match one another" in messages[0]
    batch = batch_of(task, [0, 1, 2])
    ids = batch["input_ids"].clone()
    ids[:, 0] = ENCODE
    model.eval()
    _, numbers = task.loss(model, batch)
    positives = unwrapped(model)(
        **{k: v for k, v in batch.items() if k != "groups"} | {"input_ids": ids}
    )
    want = F.cross_entropy(positives.itm_score, torch.ones(3, dtype=torch.int64))
    assert float(numbers["itm"]) == pytest.approx(want.item(), rel=1e-5)


def test_a_loss_in_eval_mode_leaves_the_queue_alone(tmp_path):
    task = make_task(tmp_path)
    model = adapted_by(task, "aurora-reference")
    hooks, _ = train(task, model, 2)
    before = hooks.state_dict()
    model.eval()
    with torch.no_grad():
        one = task.loss(model, batch_of(task, range(8)))[0]
        assert torch.equal(one, task.loss(model, batch_of(task, range(8)))[0])
        task.loss(tiny_blip().model, batch_of(task, range(8)))  # a stock model is measured so too
    for name, value in hooks.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_heads_are_kept_with_the_adapter(tmp_path):
    from mmtune.tuners.adapters import load_adapter

    task = make_task(tmp_path, rerank=4)
    model = adapted_by(task, "aurora")
    before = task.evaluate(task.loaded.model, progress=False)
    train(task, model, 10)
    after = task.evaluate(model, progress=False)
    assert after.metrics != before.metrics
    model.save_pretrained(tmp_path / "adapter")
    fresh = make_task(tmp_path, rerank=4)
    again = load_adapter(fresh.loaded.model, tmp_path / "adapter")
    # The words of a fresh tokenizer would have other numbers.
    object.__setattr__(fresh.loaded, "tokenize", task.loaded.tokenize)
    assert fresh.evaluate(again, progress=False).metrics == after.metrics


def test_other_models_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"BLIP's match head.*got CLIPModel.*task.name: retrieval"):
        BlipRetrievalTask(BlipRetrievalOptions(), colour_data(tmp_path), tiny_loaded(), 0)
