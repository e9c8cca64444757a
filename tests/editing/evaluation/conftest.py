from __future__ import annotations

import pytest

from tests.editing.evaluation.runs import add_editors
from tests.editing.tiny import tiny


@pytest.fixture(autouse=True)
def with_nudge(monkeypatch):
    """Configs may name the editors of the tests."""
    add_editors(monkeypatch)
    monkeypatch.setattr("editing.mllm.WRITTEN", 4)  # tiny models never end, and tests need not wait


@pytest.fixture(scope="package")
def mllm():
    return tiny("llava")
