"""What an adapter costs: turns of timing, file sizes, and methods that do not merge."""

from __future__ import annotations

import time

import pytest
import torch
from peft import get_peft_model

from mmtune.compare.config import load_comparison
from mmtune.compare.measuring import ROUNDS, WARM_UP, in_turns, measure
from tests.compare.small import CONFIG, LowOptions, SmallOptions, SmallTask, load, low


def test_calls_take_turns_and_each_goes_first_as_often():
    order = []
    calls = [lambda: order.append(0) or time.sleep(0.002), lambda: order.append(1)]
    slow, fast = in_turns(calls, torch.device("cpu"), rounds=6)
    assert (len(slow), len(fast)) == (6, 6)
    assert min(slow) >= 0.002
    pairs = list(zip(order[::2], order[1::2], strict=True))
    assert len(pairs) == WARM_UP + 6
    measured = pairs[WARM_UP:]
    assert measured.count((0, 1)) == measured.count((1, 0)) == 3


@pytest.fixture
def trained(tmp_path, write):
    config = load_comparison(write(CONFIG)).methods["wide"]
    loaded = load("fake")
    model = get_peft_model(loaded.model, low(loaded.model, LowOptions(4)))
    model.save_pretrained(tmp_path / "adapter")
    task = SmallTask(SmallOptions(), config.data, loaded, 0)
    return config, task, model, tmp_path / "adapter"


def test_measuring_runs_the_stock_model_beside_the_adapted_one(trained, monkeypatch):
    config, task, model, adapter = trained
    seen = []
    loss = SmallTask.loss

    def slow_if_adapted(self, model, batch):
        assert not model.training
        assert not torch.is_grad_enabled()
        seen.append((type(model).__name__, len(batch["x"])))
        time.sleep(0.004 if hasattr(model, "peft_config") else 0.001)
        return loss(self, model, batch)

    monkeypatch.setattr(SmallTask, "loss", slow_if_adapted)
    found = measure(config, task, model, adapter)
    assert seen.count(("PeftModel", 4)) == seen.count(("Sequential", 4)) == ROUNDS + WARM_UP
    assert found["adapter_bytes"] == (adapter / "adapter_model.safetensors").stat().st_size
    assert found["forward_ratio"] > 1.5
    assert found["base_seconds"] >= 0.001
    assert found["forward_seconds"] >= 0.004
    assert found["merges"] is True


def test_a_method_that_refuses_to_merge_is_no_error_and_a_bug_is(trained, monkeypatch):
    config, task, model, adapter = trained

    def refuse(**_):
        raise ValueError("no weight can hold it")

    monkeypatch.setattr(model.base_model, "merge_and_unload", refuse)
    assert measure(config, task, model, adapter)["merges"] is False

    def bug(**_):
        raise ZeroDivisionError

    monkeypatch.setattr(model.base_model, "merge_and_unload", bug)
    with pytest.raises(ZeroDivisionError):
        measure(config, task, model, adapter)
