"""Run configs: what is read, and that every mistake is told at once with file, key and remedy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from mmtune.config import ConfigError, find_config, load_config, to_yaml
from mmtune.yaml_source import as_yaml

GOOD = """\
# mmtune train x.yaml
name: small
model:
  name: zoo:tiny-clip
task:
  name: fake
data:
  train: some/where
tuner:
  method: lora
  rank: 4
training:
  lr: 1e-4
"""


@dataclass(frozen=True)
class Inner:
    weight: float = 1.0


@dataclass(frozen=True)
class Options:
    prompt: str = ""
    ks: tuple[int, ...] = (1, 5)
    mode: Literal["clip", "sigmoid"] = "clip"
    inner: Inner = field(default_factory=Inner)
    sites: list[str] | dict[str, list[str]] = field(default_factory=list)

    def __post_init__(self):
        if self.prompt == "bad":
            raise ValueError("prompt may not be 'bad'. Try ''.")


class Task:
    options = Options


@dataclass(frozen=True)
class Data:
    train: str
    on_error: Literal["raise", "skip"] = "raise"
    limit: Annotated[int, Field(ge=1)] | None = None


@pytest.fixture(autouse=True)
def _fakes(monkeypatch):
    monkeypatch.setattr("mmtune.tasks.tasks", lambda: {"fake": Task, "other": Task})
    monkeypatch.setattr("mmtune.data.DataOptions", Data, raising=False)


@pytest.fixture
def write(tmp_path):
    def writer(text):
        path = tmp_path / "x.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return writer


def mistakes(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return [str(m) for m in caught.value.mistakes]


def test_good_config_with_defaults(write):
    config = load_config(write(GOOD))
    assert (config.name, config.seed, config.method, config.tuner_options.rank) == (
        "small", 0, "lora", 4,
    )  # fmt: skip
    assert config.training.lr == 1e-4
    assert config.data == Data("some/where")


def test_three_mistakes_are_listed_with_key_paths_and_suggestions(write):
    bad = GOOD.replace("rank: 4", "rnak: 4").replace("lr: 1e-4", "lr: fast\n  schedule: cosin")
    found = mistakes(write(bad))
    assert len(found) == 3
    rank, lr, schedule = sorted(found, key=lambda text: ["rnak", ".lr", "sched"].index(
        next(k for k in ("rnak", ".lr", "sched") if k in text)
    ))  # fmt: skip
    assert "x.yaml:11: tuner.rnak: unknown key, got 4; expected one of method, rank," not in rank
    assert "x.yaml:11: tuner.rnak: unknown key, got 4" in rank
    assert "Did you mean 'rank'?" in rank
    assert lr.endswith("x.yaml:13: training.lr: expected a number, got 'fast'")
    assert "x.yaml:14: training.schedule: expected one of cosine, linear, constant" in schedule
    assert "got 'cosin'. Did you mean 'cosine'?" in schedule


def test_mistakes_of_every_section_come_in_one_pass(write):
    bad = (
        "name: ../up\nseed: -1\nmodle: {}\nmodel: {dtype: float99}\ntask: {name: fkae}\n"
        "data: {on_error: ignore}\ntuner: {method: lroa}\ntraining: {epochs: 0, batch_size: 1.5}\n"
    )
    found = "\n".join(mistakes(write(bad)))
    for text in (
        "name: expected letters",
        "seed: expected greater than or equal to 0, got -1",
        "modle: unknown key, got {}; expected one of name, seed, model",
        "model.name: missing",
        "model.dtype: expected one of float32, bfloat16, float16, got 'float99'",
        "task.name: no task 'fkae'; there are fake, other. Did you mean 'fake'?",
        "data.train: missing",
        "data.on_error: expected one of raise, skip, got 'ignore'",
        "tuner.method: no method 'lroa'",
        "training.epochs: expected greater than 0, got 0",
        "training.batch_size: expected a whole number, got 1.5",
    ):
        assert text in found, text


def test_options_that_refuse_themselves_and_nested_unknown_keys(write):
    found = mistakes(write(GOOD), "task.prompt=bad")
    assert len(found) == 1
    assert found[0].endswith("x.yaml:5: task: prompt may not be 'bad'. Try ''.")
    found = mistakes(write(GOOD), "task.inner.wieght=2")
    assert len(found) == 1
    assert "task.inner.wieght: unknown key, got 2; expected one of weight." in found[0]
    assert "Did you mean 'weight'?" in found[0]


def test_union_alternatives_are_joined_into_one_mistake(write):
    (found,) = mistakes(write(GOOD), "task.sites=3")
    assert found.endswith("task.sites: expected a list or a mapping, got 3")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E3", 1e3), ("1.0e-4", 1e-4), (".5", 0.5), ("3", 3.0), ("2e+1", 20.0)],
)
def test_numbers_without_a_dot_are_numbers(write, text, value):
    assert load_config(write(GOOD.replace("1e-4", text))).training.lr == value
    assert load_config(write(GOOD), [f"training.lr={text}"]).training.lr == value


def test_text_that_looks_like_an_exponent_stays_text(write):
    assert load_config(write(GOOD), ["task.prompt='1e4'"]).task_options.prompt == "1e4"
    assert load_config(write(GOOD), ["task.prompt=e5"]).task_options.prompt == "e5"


def test_off_is_a_word_in_files_and_overrides(write):
    text = GOOD.replace("method: lora", "method: aurora\n  gate: off")
    config = load_config(write(text), ["tuner.context=off"])
    assert (config.tuner_options.gate, config.tuner_options.context) == ("off", "off")
    assert load_config(write(to_yaml(config))).tuner_options == config.tuner_options


def test_overrides_reach_every_section_and_make_absent_ones(write):
    config = load_config(
        write(GOOD.replace("training:\n  lr: 1e-4\n", "")),
        ["seed=3", "training.lr=2e-3", "task.ks=[2, 3]", "data.limit=null", "name=other"],
    )
    assert (config.seed, config.training.lr, config.task_options.ks) == (3, 2e-3, (2, 3))
    assert (config.data.limit, config.name) == (None, "other")


def test_bad_overrides_are_mistakes_too(write):
    found = mistakes(write(GOOD), "training", "training.lr.x=3", "training.lr=quick")
    assert len(found) == 3
    assert "command line (training): expected dotted.key=value" in found[0]
    assert "training.lr: holds 0.0001, so it has no key 'x'" in found[1]
    assert "command line (training.lr=quick): training.lr: expected a number" in found[2]


def test_changing_the_chosen_method_checks_the_keys_of_the_new_one(write):
    (found,) = mistakes(write(GOOD.replace("rank: 4", "rslora: true")), "tuner.method=aurora")
    assert "x.yaml:11: tuner.rslora: unknown key, got True" in found


def test_repeated_keys_are_refused_with_both_lines(write):
    found = mistakes(write(GOOD + "  lr: 2e-4\nname: again\n"))
    assert any("x.yaml:14: training.lr: given twice (first on line 13)" in m for m in found)
    assert any("x.yaml:15: name: given twice (first on line 2)" in m for m in found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping"),
        ("- a\n", "expected a mapping"),
        ("a: [1\n", "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
        ("a: *b\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_config(write, text, message):
    (found,) = mistakes(write(text))
    assert message in found
    assert "x.yaml" in found


def test_binary_file_is_named(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00a")
    assert "not UTF-8" in mistakes(path)[0]


def test_unknown_config_name_lists_those_there_are():
    with pytest.raises(ConfigError, match=r"demo/retrieval.*Did you mean 'demo/retrieval'"):
        find_config("demo/retrieva")


@pytest.mark.parametrize("name", ["demo/retrieval", "configs/demo/retrieval.yaml", "retrieval"])
def test_shipped_configs_are_found_by_name_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name).name == "retrieval.yaml"


def test_a_file_comes_before_a_shipped_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "retrieval").write_text(GOOD)
    assert load_config("retrieval").name == "small"


@given(
    lr=st.floats(1e-12, 1e3),
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
    prompt=st.text(max_size=30).filter(lambda text: text != "bad"),
    ks=st.lists(st.integers(), max_size=3),
)
def test_resolved_config_reads_back_equal(tmp_path_factory, lr, name, prompt, ks):
    from dataclasses import replace

    path = tmp_path_factory.mktemp("config") / "x.yaml"
    path.write_text(GOOD, encoding="utf-8")
    config = load_config(path)
    config = replace(
        config,
        name=name,
        task_options=Options(prompt=prompt, ks=tuple(ks)),
        training=replace(config.training, lr=lr),
    )
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config


@given(st.dictionaries(st.text(min_size=1), st.text() | st.lists(st.text()), max_size=4))
def test_every_text_reads_back_from_yaml(document):
    assert yaml.safe_load(as_yaml(document)) == document
    assert list(yaml.safe_load(as_yaml(document))) == list(document)


def test_a_line_break_that_yaml_would_fold_reads_back():
    document = {"prompt": "!\x85", "é": ["ü"]}
    assert yaml.safe_load(as_yaml(document)) == document
    assert as_yaml({"é": "ü"}) == "é: ü\n"
