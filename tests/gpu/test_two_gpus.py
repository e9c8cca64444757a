"""Two GPUs train like one with the batch of both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def trained(folder, batch_size, launcher=(), **settings):
    """The losses and the adapter of ten steps of the first demo."""
    settings = {"batch_size": batch_size, "max_steps": 10, "log_every": 1, **settings}
    command = [
        sys.executable,
        *launcher,
        "-m",
        "mmtune.cli",
        "train",
        "configs/demo/retrieval.yaml",
    ]
    command += [f"training.{name}={value}" for name, value in settings.items()]
    done = subprocess.run(
        [*command, "name=run", "--runs", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    (adapter,) = (folder / "run").rglob("adapter/adapter_model.safetensors")
    return losses, load_file(adapter)


@pytest.mark.parametrize("settings", [{}, {"cuda_graphs": "true"}])
def test_losses_and_weights_are_those_of_one(tmp_path, settings):
    losses, weights = trained(tmp_path / "one", 32)
    found, same = trained(tmp_path / "two", 16, TORCHRUN, **settings)
    assert len(found) == 10
    assert found == pytest.approx(losses, rel=1e-3)
    for name, value in weights.items():
        assert (same[name] - value).norm() <= 1e-2 * value.norm(), name
