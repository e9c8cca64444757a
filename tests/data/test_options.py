from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import TypeAdapter, ValidationError

from mmtune.data import DataOptions, SourceOptions
from mmtune.tasks.retrieval import RetrievalOptions


def test_sections_are_read_from_plain_mappings():
    raw = {
        "train": {"format": "zoo", "name": "clipart-animals", "limit": 5},
        "test": {"format": "karpathy", "path": "x.json", "images": "coco"},
        "on_error": "skip",
    }
    data = TypeAdapter(DataOptions).validate_python(raw)
    assert data.train == SourceOptions("zoo", name="clipart-animals", limit=5)
    assert data.val is None
    task = TypeAdapter(RetrievalOptions).validate_python(
        {"augment": {"scale": [0.5, 1], "flip": 0.5}}
    )
    assert task.augment.scale == (0.5, 1.0)
    assert TypeAdapter(RetrievalOptions).validate_python({"augment": None}).augment is None


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"train": {"format": "zoo"}}, "needs `name`"),
        ({"train": {"format": "blip"}}, "needs `path`"),
        ({"train": {"format": "coco", "path": "x"}}, "'zoo', 'karpathy'"),
        ({"train": {"format": "blip", "path": "x", "limit": 0}}, "greater than or equal to 1"),
        ({"on_error": "ignore"}, "'raise' or 'skip'"),
    ],
)
def test_mistakes_are_refused(raw, message):
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(DataOptions).validate_python(raw)


def test_options_are_read_without_heavy_imports():
    code = (
        "import sys, mmtune.data, mmtune.tasks.retrieval, mmtune.data.readers\n"
        "heavy = {'torch', 'PIL', 'numpy', 'pyarrow', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
