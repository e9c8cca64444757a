"""The fake task, model and methods for every test of this folder."""

from __future__ import annotations

import pytest

from tests.compare import small


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small.install(monkeypatch.setattr)


@pytest.fixture
def write(tmp_path):
    def writer(text):
        path = tmp_path / "small.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return writer
