"""BLIP retrieval on several processes, and through a kill."""

from __future__ import annotations

import random
import signal
import subprocess
import sys

import pytest
import torch

from tests.tasks.blip_retrieval_process import CASES, STEPS, steps
from tests.tasks.group import ROOT, run_module


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two gloo processes found, by case."""
    folder = tmp_path_factory.mktemp("blip")
    run_module("tests.tasks.blip_retrieval_process", folder)
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
        for name in CASES
    }


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_like_one_with_the_batch_of_both(two_processes, tmp_path, name):
    one = steps(tmp_path / "data", name, [i for share in CASES[name][2] for i in share])
    two = two_processes[name]
    together = (two[0]["losses"] + two[1]["losses"]) / 2
    torch.testing.assert_close(together, one["losses"], rtol=1e-5, atol=1e-6)
    assert (two[0]["losses"] - two[1]["losses"]).abs().min() > 1e-3  # each has rows of its own
    for found in two:
        for part in ("gradients", "state"):
            assert found[part].keys() == one[part].keys()
            for key, value in one[part].items():
                torch.testing.assert_close(
                    found[part][key], value, rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
                )
    for key, value in two[0]["state"].items():
        assert torch.equal(value, two[1]["state"][key]), key
    count = STEPS * sum(map(len, CASES[name][2]))
    assert int(one["state"]["seen"]) == count
    assert int(one["state"]["queue.next"]) == count % 11
    assert max(g.abs().max() for g in one["gradients"].values()) > 1e-2


ADAPTER = "adapter_model.safetensors"  # lies in the last checkpoint too
KEPT = (ADAPTER, ADAPTER, "hooks.safetensors", "metrics.jsonl")


def begin(*arguments):
    command = [sys.executable, "-m", "tests.tasks.blip_retrieval_run", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT)


def ended(process):
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors.decode()


def test_a_run_that_is_killed_and_resumed_ends_bit_identical(tmp_path):
    kill = random.Random().randint(5, 18)  # of 18 micro-steps
    whole, cut = begin(tmp_path / "whole", 0), begin(tmp_path / "cut", kill)
    code, errors = ended(cut)
    assert code == -signal.SIGKILL, f"kill {kill}: {errors}"
    code, errors = ended(begin(tmp_path / "cut", 0, "--resume"))
    assert code == 0, f"kill {kill}: {errors}"
    code, errors = ended(whole)
    assert code == 0, errors
    files = [p for p in (tmp_path / "whole").rglob("*") if p.name in KEPT]
    assert sorted(p.name for p in files) == sorted(KEPT)
    for path in files:
        other = tmp_path / "cut" / path.relative_to(tmp_path / "whole")
        assert path.read_bytes() == other.read_bytes(), f"{path.name}, kill {kill}"
