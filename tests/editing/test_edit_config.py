"""Configs of `mmtune edit`: read back as written, and every mistake told at once."""

from __future__ import annotations

import pytest
import yaml

from editing.config import COUNTS, load_edit_config, to_yaml
from editing.methods.finetune import ConstrainedOptions, FineTuneOptions
from editing.regions import Region
from mmtune.yaml_source import ConfigError

GOOD = {
    "name": "mine",
    "seed": 3,
    "model": {"name": "hf:x", "dtype": "bfloat16", "templates": {"question": "Q: {question} A:"}},
    "data": {"path": "records.json", "images": "pictures", "limit": 7},
    "protocol": {"kind": "sequential", "counts": [5, 1], "compat": ["mmedit"]},
    "editors": {
        "ft": {"editor": "ft", "region": {"branches": ["language"], "layers": [0, 1]}, "lr": 1e-3},
        "bounded": {"editor": "ft-l", "region": "vision"},
    },
}


def written(folder, document):
    path = folder / "edit.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path


def mistakes(folder, document, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_edit_config(written(folder, document), overrides)
    return {m.key: str(m) for m in caught.value.mistakes}


def test_options_of_each_row_are_its_editors(tmp_path):
    config = load_edit_config(written(tmp_path, GOOD))
    region = Region(branches=("language",), layers=(0, 1))
    assert config.editors["ft"].options == FineTuneOptions(region=region, lr=1e-3)
    assert config.editors["bounded"].options == ConstrainedOptions(region="vision")
    assert config.protocol.numbers == [1, 5]
    assert (config.seed, config.data.limit, config.model.dtype) == (3, 7, "bfloat16")


def test_what_is_written_reads_back(tmp_path):
    config = load_edit_config(written(tmp_path, GOOD))
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config), encoding="utf-8")
    assert load_edit_config(copy) == config


def test_overrides_reach_into_rows(tmp_path):
    path = written(tmp_path, GOOD)
    config = load_edit_config(path, ["editors.ft.lr=1e-2", "data.stand_ins=any", "seed=9"])
    assert config.editors["ft"].options.lr == 1e-2
    assert (config.data.stand_ins, config.seed) == ("any", 9)


def test_defaults(tmp_path):
    least = {"model": {"name": "m"}, "data": {"path": "p"}, "editors": {"ft": {"editor": "ft"}}}
    config = load_edit_config(written(tmp_path, least))
    assert (config.name, config.protocol.kind, config.protocol.numbers) == ("edit", "single", [1])
    several = load_edit_config(written(tmp_path, least), ["protocol.kind=batch"])
    assert several.protocol.numbers == list(COUNTS)


def test_every_mistake_is_told_with_its_place(tmp_path):
    document = GOOD | {
        "modle": 1,
        "model": {"name": "m", "dtype": "float8"},
        "data": {"pth": "x"},
        "protocol": {"kind": "single", "counts": [1]},
        "editors": {
            "a": {"editor": "ft-1"},
            "b": {"editor": "ft", "learning_rate": 1},
            "c": {"region": "vision"},
            "unedited": {"editor": "ft"},
            "no/name": {"editor": "lora", "rank": 0},
        },
    }
    found = mistakes(tmp_path, document, "seed=-1")
    assert "Did you mean 'model'?" in found["modle"]
    assert "bfloat16" in found["model.dtype"]
    assert "Did you mean 'path'?" in found["data.pth"]
    assert "no default" in found["data.path"]
    assert "no meaning in kind: single" in found["protocol"]
    assert "there are" in found["editors.a.editor"]
    assert "Did you mean 'ft-l'" in found["editors.a.editor"]
    assert "lr" in found["editors.b.learning_rate"]
    assert "{editor: ft, region: vision}" in found["editors.c"]
    assert "choose another" in found["editors.unedited"]
    assert "no/name" in found["editors.no/name"]
    assert "editors.no/name.rank" in found
    assert found["seed"].startswith("command line (seed=-1)")
    assert f"{tmp_path}/edit.yaml:" in found["editors.a.editor"]


@pytest.mark.parametrize("editors", [None, {}, ["ft"], "ft"])
def test_editors_are_a_mapping_with_a_row(editors, tmp_path):
    assert "editors" in mistakes(tmp_path, GOOD | {"editors": editors})


def test_a_count_is_given_once(tmp_path):
    protocol = {"kind": "batch", "counts": [2, 2]}
    assert "keep one" in mistakes(tmp_path, GOOD | {"protocol": protocol})["protocol"]
