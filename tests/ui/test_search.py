"""What the tab Search finds: the rankings of evaluation, and messages for what it cannot do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmtune import backbones, zoo
from mmtune.data.checking import check
from mmtune.data.options import DataOptions, SourceOptions
from mmtune.tasks.retrieval import RetrievalOptions, RetrievalTask
from mmtune.tuners.adapters import load_adapter
from mmtune.ui import search as searching
from mmtune.ui.problems import PageProblem
from mmtune.ui.search import image_search, pictures_in
from tests.tasks.tiny import tiny_loaded
from tests.ui.adapters import random_adapter

COUNT, BATCH, TOP = 21, 16, 10  # more pictures than are embedded at once


@pytest.fixture(scope="module", autouse=True)
def batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searching, "BATCH", BATCH)
        yield


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return random_adapter(zoo.load("tiny-clip"), tmp_path_factory.mktemp("adapter") / "lora")


@pytest.fixture(scope="module")
def task():
    source = SourceOptions("zoo", name="clipart-animals", limit=COUNT)
    options = RetrievalOptions(eval_batch_size=BATCH, resamples=100)
    return RetrievalTask(
        options, DataOptions(test=source), zoo.load("tiny-clip"), 0, progress=False
    )


@pytest.fixture(scope="module")
def search(task, adapter):
    return image_search("zoo:tiny-clip", task.gallery_of("test").records, adapter)


def top(task, model):
    """[captions, TOP] what evaluation ranks first."""
    found = task.evaluate(model, "test", progress=False)
    return found.details["ranks"][""].txt2img.top[:, :TOP]


def test_rankings_are_those_of_evaluation(task, search, adapter):
    gallery = task.gallery_of("test")
    number = {id(record): i for i, record in enumerate(gallery.records)}
    found = [list(search.find(caption, TOP).sides.values()) for caption in gallery.captions]
    base, adapted = (
        np.array([[number[id(hit.record)] for hit in sides[side]] for sides in found])
        for side in (0, 1)
    )
    before = top(task, task.loaded.model)
    after = top(task, load_adapter(zoo.load("tiny-clip").model, adapter))
    np.testing.assert_array_equal(base, before)
    np.testing.assert_array_equal(adapted, after)
    assert (base != adapted).any()


def test_a_hit_says_its_place_among_the_answers_of_the_base(search):
    base, adapted = search.find("a red bird", COUNT).sides.values()
    places = {id(hit.record): hit.rank for hit in base}
    assert [hit.rank for hit in base] == list(range(1, COUNT + 1))
    assert all(hit.base_rank is None for hit in base)
    assert [hit.base_rank for hit in adapted] == [places[id(hit.record)] for hit in adapted]
    for side in (base, adapted):
        scores = [hit.score for hit in side]
        assert scores == sorted(scores, reverse=True)
        assert all(-1 <= score <= 1 for score in scores)


def test_features_are_computed_once_a_model(task, adapter, monkeypatch):
    records = task.gallery_of("test").records
    fresh = image_search("zoo:tiny-clip", records, adapter)
    told, decoded = [], []
    stock = searching._image_features

    def counted(side, *rest):
        decoded.append(side.title)
        return stock(side, *rest)

    monkeypatch.setattr(searching, "_image_features", counted)
    fresh.embed(lambda done, of, what: told.append((done, of, what)))
    fresh.find("a bird")
    fresh.find("a fish")
    fresh.embed()
    titles = [side.title for side in fresh.sides]
    assert decoded == titles
    assert told == [(done, COUNT, title) for title in titles for done in (0, BATCH, COUNT)]


@pytest.mark.parametrize("query", ["", "  \n\t"])
def test_an_empty_query_is_told_what_to_type(search, query):
    with pytest.raises(PageProblem, match="Type what to look for"):
        search.find(query)


def test_a_long_query_is_cut_and_says_so(search):
    read = "bird " * 100
    found, other = search.find(read), search.find(read + "lion " * 500)
    assert "102 tokens and the model reads 32" in found.note
    assert "602 tokens" in other.note
    assert found.sides == other.sides
    assert search.find("bird").note == ""


def test_more_pictures_than_there_are_gives_all(search):
    assert {len(hits) for hits in search.find("a bird", 10_000).sides.values()} == {COUNT}


def test_an_adapter_of_another_model_leaves_the_base(task, tmp_path):
    other = random_adapter(tiny_loaded(), tmp_path / "other", ("q",))
    found = image_search("zoo:tiny-clip", task.gallery_of("test").records, other)
    assert len(found.sides) == 1
    assert "The adapter cannot be used" in found.problem
    assert str(other) in found.problem
    assert len(found.find("a bird").sides) == 1


@pytest.mark.parametrize("content", [None, "{", '{"peft_type": "NONE"}'])
def test_a_folder_without_a_usable_adapter_is_told(task, tmp_path, content):
    folder = tmp_path / "damaged"
    folder.mkdir()
    if content is not None:
        (folder / "adapter_config.json").write_text(content)
        (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    found = image_search("zoo:tiny-clip", task.gallery_of("test").records, folder)
    assert len(found.sides) == 1
    assert found.problem.startswith("The adapter cannot be used")


def test_the_base_is_the_stock_model_whatever_the_adapter_does(task, search):
    side = search.sides[0]
    own = zoo.load("tiny-clip").model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in side.model.state_dict().items())


def test_a_model_that_embeds_nothing_is_told(monkeypatch):
    from tests.editing.tiny import SPEC, stock

    model, view, tokenizer = stock("llava")
    writes = backbones.base.Loaded(
        model, view, SPEC, lambda texts: tokenizer(texts, return_tensors="pt"), 64, "writer", len
    )
    monkeypatch.setattr(backbones, "load", lambda name, dtype: writes)
    with pytest.raises(PageProblem, match=r"writer has no features to search by.*--mllm"):
        image_search("writer", [])


def test_pictures_of_a_folder_and_below_in_order_those_that_are_broken_left_out(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "sub/c.JPG", "a.webp"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"nothing")
    (tmp_path / "notes.txt").write_text("no picture")
    found = check(pictures_in(tmp_path), "skip", progress=False)
    assert [record.captions for record in found.records] == [
        ("a.webp",),
        ("b.png",),
        ("sub/c.JPG",),
    ]
    assert found.skipped == {"not an image": 1}


def test_a_folder_that_is_missing_or_without_pictures_is_told(tmp_path):
    with pytest.raises(PageProblem, match="no folder"):
        pictures_in(tmp_path / "missing")
    with pytest.raises(PageProblem, match="no image in"):
        pictures_in(tmp_path)
