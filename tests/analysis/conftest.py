"""Every name of a model is one of the tiny ones, and one thread computes."""

from __future__ import annotations

import pytest
import torch

from tests.analysis import made


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr("mmtune.backbones.load", made.load)
