"""Configs of builds: recipes and their defaults, every mistake at once, and back to YAML."""

from __future__ import annotations

import pytest

from data_builders.config import load_build_config, to_yaml
from data_builders.recipes import recipes
from data_builders.sources import sources
from data_builders.stages import stages
from mmtune.yaml_source import ConfigError

LEAST = """\
recipe: RECIPE
model: {name: zoo:tiny-llava}
source: {format: clipart}
pools:
  text: {format: facts}
  image: {format: clipart, seed: 1}
"""


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def mistakes(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_build_config(path, overrides)
    return {m.key: m.text for m in caught.value.mistakes}


@pytest.mark.parametrize("recipe", recipes())
def test_a_recipe_fills_every_slot_with_stages_that_are_there(recipe, tmp_path):
    config = load_build_config(write(tmp_path, LEAST.replace("RECIPE", recipe)))
    slots = recipes()[recipe].slots
    assert {slot: one.by for slot, one in config.stages.items() if one.by} == slots
    for slot, by in slots.items():
        assert isinstance(config.stages[slot].options, stages()[slot][by].options)
    assert config.name == "mine"
    assert (config.limit, config.pool_limit, config.on_fault) == (None, None, "skip")


def test_the_recipes_differ_in_what_they_edit():
    both = recipes()
    assert both["evqa"].samples["select"] == "questions"
    assert both["eic"].samples["select"] == "captions"
    assert [*both["evqa"].samples] == [*both["eic"].samples] == [
        "select", "rephrase", "imagine", "filter",
    ]  # fmt: skip


def test_every_stage_and_source_has_a_name_of_its_own_slot():
    for slot, own in stages().items():
        assert all(stage.slot == slot and stage.name == name for name, stage in own.items())
    assert all(source.name == name for name, source in sources().items())


@pytest.mark.parametrize("recipe", recipes())
def test_the_resolved_config_reads_back(recipe, tmp_path):
    overrides = ["limit=5", "stages.imagine.by=pairs", "engine={kind: ray, address: 'ray://x:1'}"]
    config = load_build_config(write(tmp_path, LEAST.replace("RECIPE", recipe)), overrides)
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config))
    assert load_build_config(copy) == config
    assert config.stages["imagine"].by == "pairs"
    assert config.engine.address == "ray://x:1"


def test_all_mistakes_are_told_at_once(tmp_path):
    path = write(
        tmp_path,
        """\
name: bad/name
seed: -1
recipe: evqua
model: {nam: x}
source: {format: clipard}
pools: {text: {format: facts, pathh: x}, image: {split: test}, video: {}}
assemble: {images: move}
engine: {workers: 0}
shard_size: 0
limit: many
on_fault: go
extra: 1
""",
    )
    found = mistakes(path)
    assert "Did you mean 'evqa'" in found["recipe"]
    assert "Did you mean 'clipart'" in found["source.format"]
    assert "unknown key" in found["pools.text.pathh"]
    assert "with the key format" in found["pools.image"]
    assert "expected one of text, image" in found["pools.video"]
    assert set(found) > {
        "name", "seed", "model.nam", "model.name", "assemble.images", "engine.workers",
        "shard_size", "limit", "on_fault", "extra",
    }  # fmt: skip


def test_mistakes_in_stages(tmp_path):
    path = write(
        tmp_path,
        LEAST.replace("RECIPE", "evqa")
        + "stages: {select: {by: question}, imagin: {}, rephrase: 3, locality: {reuse: 7},"
        " filter: {modell: x}, imagine: {by: pairs, steps: 3}}\n",
    )
    found = mistakes(path)
    assert "Did you mean 'questions'" in found["stages.select.by"]
    assert "Did you mean 'imagine'" in found["stages.imagin"]
    assert "one of chat, templates, wordings; got 3" in found["stages.rephrase"]
    assert found["stages.locality.reuse"].startswith("expected true or false")
    assert "unknown key" in found["stages.filter.modell"]
    assert "unknown key" in found["stages.imagine.steps"]


@pytest.mark.parametrize(
    ("text", "key", "told"),
    [
        ("engine: {address: auto}", "engine", "address needs kind: ray"),
        ("engine: {kind: spark}", "engine.kind", "one of local, ray, got"),
        ("stages: [select]", "stages", "expected a mapping"),
    ],
)
def test_a_mistake_says_how_to_mend_it(text, key, told, tmp_path):
    found = mistakes(write(tmp_path, LEAST.replace("RECIPE", "evqa") + text))
    assert told in found[key]


def test_pools_are_needed(tmp_path):
    text = LEAST.replace("RECIPE", "evqa").partition("pools:")[0]
    assert "it is missing" in mistakes(write(tmp_path, text))["pools"]
    found = mistakes(write(tmp_path, text + "pools: {text: {format: facts}}"))
    assert "it is missing" in found["pools.image"]
