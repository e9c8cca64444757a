"""The shipped data sets are what their card says, and nothing leaks between their splits."""

import io
import json
from collections import defaultdict

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_builders.clipart_splits import NEAR_BITS
from data_builders.near_duplicates import near_pairs, picture_hash
from data_builders.sources.openclipart import normalise
from mmtune import zoo

FILES = [
    (name, split)
    for name, splits in zoo.names().items()
    if name.startswith("clipart")
    for split in splits
]
BY_TEXT_ALONE = "clipart-test-text"


@pytest.fixture(scope="module")
def rows():
    return {f"{n}-{s}": pq.read_table(zoo.data_path(n, s)).to_pylist() for n, s in FILES}


@pytest.fixture(scope="module")
def pictures(rows):
    return {
        name: [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in some]
        for name, some in rows.items()
    }


def test_names():
    assert zoo.names()["clipart"] == ["train", "val", "test", "test-text"]
    for name in ("clipart-animals", "clipart-food"):
        assert zoo.names()[name] == ["train", "val", "test"]
    assert zoo.names()["easy-vqa"] == ["train", "val", "test"]


def test_unknown_names_are_refused_with_what_there_is():
    with pytest.raises(zoo.ZooError, match="clipart-animals"):
        zoo.data_path("clipart-anmals", "train")
    with pytest.raises(zoo.ZooError, match="train, val, test, test-text"):
        zoo.data_path("clipart", "dev")
    with pytest.raises(zoo.ZooError, match="tiny-clip"):
        zoo.model_path("tiny-clap")
    with pytest.raises(zoo.ZooError, match="tiny-clip has no flavour 'vqa'; it has open_clip, hf"):
        zoo.load("tiny-clip", flavour="vqa")


def test_every_picture_decodes(pictures):
    for some in pictures.values():
        for image in some:
            assert 1 <= max(image.size) <= 128
            assert np.asarray(image).min() < 250


def test_counts_are_those_of_summary_and_card(rows):
    counts = {name: len(some) for name, some in rows.items()}
    assert counts == json.loads((zoo.DATA_ROOT / "clipart.json").read_text())["counts"]
    card = (zoo.DATA_ROOT / "README.md").read_text()
    for name, splits in zoo.names().items():
        if name.startswith("clipart"):
            cells = [f"{counts[f'{name}-{split}']:,}" for split in splits]
            assert f"| `{name}` | {' | '.join(cells)} |" in card.replace(" | - |", " |")


def test_size():
    assert sum(path.stat().st_size for path in zoo.DATA_ROOT.iterdir()) < 24e6


def test_pretraining_tests_hold_distinct_texts(rows):
    for name in ("clipart-test", BY_TEXT_ALONE):
        assert len({normalise(row["caption"]) for row in rows[name]}) == len(rows[name])
    assert len(rows[BY_TEXT_ALONE]) == 500
    assert len(rows["clipart-test"]) >= 485  # 500 less those that the last check left out


def test_no_text_crosses(rows):
    found = defaultdict(set)
    for name, some in rows.items():
        for row in some:
            found["title", normalise(row["title"])].add(name)
            found["caption", normalise(row["caption"])].add(name)
    crossing = {text: names for text, names in found.items() if len(names) > 1}
    assert crossing == {}


def test_no_near_duplicate_crosses(pictures):
    names = [name for name, some in pictures.items() for _ in some]
    hashes = np.stack([picture_hash(image) for some in pictures.values() for image in some])
    crossing = [
        (names[i], names[j])
        for i, j in near_pairs(hashes, NEAR_BITS)
        if names[i] != names[j] and BY_TEXT_ALONE not in (names[i], names[j])
    ]
    assert crossing == []


def test_held_out_categories_are_not_in_pretraining(rows):
    for name, some in rows.items():
        if name.startswith(("clipart-animals", "clipart-food")):
            continue
        assert not {row["category"] for row in some} & {"animals", "food"}


def test_columns_read_as_a_dataset_with_images():
    schema = pq.read_schema(zoo.data_path("clipart-animals", "val"))
    names = ["image", "caption", "title", "keywords", "description", "category", "id"]
    assert schema.names == names
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}


def test_datasets_decodes_the_image_column():
    from datasets import Dataset

    loaded = Dataset.from_parquet(str(zoo.data_path("clipart-animals", "val")))
    assert loaded[0]["image"].size[0] <= 128
    assert isinstance(loaded[0]["keywords"], list)
