"""`mmtune probe` from the command line: resumed, replayed, compared with an edited model."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from editing.methods.finetune import FineTune, FineTuneOptions
from editing.requests import EditRequest
from mmtune.cli import main
from mmtune.probe import running
from mmtune.probe.config import load_probe_config, to_yaml
from mmtune.probe.page import tables
from mmtune.probe.running import probe
from mmtune.probe.styles import STYLES
from mmtune.probe.tables import notes, numbers_of
from mmtune.runs import RunError
from mmtune.yaml_source import ConfigError
from tests.editing.tiny import tiny
from tests.probe.sets import WHOLE, Told, item, written
from tests.report.browser import looks_right


@pytest.fixture
def config(tmp_path):
    items = [item(f"{i}", "yes" if i % 2 else "no", f"{i}.png", "xy"[i // 3],
                  regions=(WHOLE,) if i else ()) for i in range(6)]  # fmt: skip
    path = written(tmp_path, items)
    document = {
        "name": "mine",
        "items": {"format": "jsonl", "path": str(path)},
        "models": {"told": {"model": {"name": "none"}}},
    }
    file = tmp_path / "probe.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


@pytest.fixture
def told(monkeypatch):
    """The client that every local model is; it says yes."""
    from contextlib import contextmanager

    client = Told(lambda sent: "yes")

    @contextmanager
    def client_of(name, options):
        yield client

    monkeypatch.setattr(running, "client_of", client_of)
    return client


def test_every_item_is_asked_in_every_style_once(config, told, tmp_path):
    found = probe(load_probe_config(config), tmp_path / "runs")
    assert len(found.outcomes) == len(told.asked) == 6 + 5 + 6 + 6
    assert found.left_out == {"simple": 0, "referring": 1, "reasoning": 0, "few-shot": 0}
    probe(load_probe_config(config), tmp_path / "runs")
    assert len(told.asked) == 23


def test_replies_of_models_and_styles_that_are_left_out_wait_in_the_journal(config, told, tmp_path):
    changes = ["models.again={model: {name: none}}"]
    whole = probe(load_probe_config(config, changes), tmp_path / "runs")
    told.asked = []
    found = probe(load_probe_config(config, ["styles=[reasoning, simple]"]), tmp_path / "runs")
    assert found.outcomes == whole.of("told", "reasoning") + whole.of("told", "simple")
    assert probe(load_probe_config(config, changes), tmp_path / "runs") == whole
    assert told.asked == []


def test_a_model_that_was_left_out_does_not_come_back_as_another_one(config, told, tmp_path):
    probe(load_probe_config(config, ["models.again={model: {name: none}}"]), tmp_path / "runs")
    probe(load_probe_config(config), tmp_path / "runs")
    with pytest.raises(RunError, match="other settings of a model"):
        probe(load_probe_config(config, ["models.again={model: {name: no}}"]), tmp_path / "runs")


def test_a_model_that_never_answered_leaves_nothing_behind(config, told, tmp_path, monkeypatch):
    changes = ["models.again={model: {name: none}}"]
    with monkeypatch.context() as patch:
        ask = running.client_of
        broken = {"told": ask, "again": None}  # cannot be loaded
        patch.setattr(running, "client_of", lambda name, options: broken[name](name, options))
        with pytest.raises(TypeError):
            probe(load_probe_config(config, changes), tmp_path / "runs")
        probe(load_probe_config(config), tmp_path / "runs")
    assert load_probe_config(tmp_path / "runs/mine/config.yaml").models.keys() == {"told"}
    changed = load_probe_config(config, ["models.again={model: {name: no}}"])
    found = probe(changed, tmp_path / "runs")
    assert len(found.outcomes) == 2 * 23


def test_nothing_is_loaded_where_nothing_is_missing(config, told, tmp_path, monkeypatch):
    first = probe(load_probe_config(config), tmp_path / "runs")
    monkeypatch.setattr(running, "client_of", None)
    assert probe(load_probe_config(config), tmp_path / "runs") == first
    alone = load_probe_config(config, ["name=alone", "items.limit=1", "styles=[few-shot]"])
    found = probe(alone, tmp_path / "runs")  # one item of each category: no examples
    assert found.outcomes == []
    assert found.left_out == {"few-shot": 2}


def test_a_style_alone_says_which_items_it_fits(config, told, tmp_path, monkeypatch):
    """Requests are made a batch ahead at most, and one that cannot be made is tried once."""
    made = []

    def odd(item, items, options):
        made.append(item.id)
        assert len(made) <= 2 * (len(told.asked) + told.batch)
        return STYLES["simple"](item, items, options) if int(item.id) % 2 else None

    monkeypatch.setitem(STYLES, "odd", odd)
    changes = ["styles=[odd, simple]", "models.again={model: {name: none}}"]
    found = probe(load_probe_config(config, changes), tmp_path / "runs")
    assert found.left_out == {"odd": 3, "simple": 0}
    assert [o.item for o in found.of("told", "odd")] == ["1", "3", "5"]
    assert [o.item for o in found.of("again", "odd")] == ["1", "3", "5"]
    assert made == [*"012345", *"135"]


@pytest.mark.parametrize("at", [0, 1, 7, 22])
def test_a_probe_that_was_stopped_goes_on(config, told, tmp_path, at):
    whole = probe(load_probe_config(config), tmp_path / "whole").outcomes
    answer, count = told.answer, iter(range(100))

    def stopping(sent):
        if next(count) == at:
            raise KeyboardInterrupt
        return answer(sent)

    told.answer, told.asked = stopping, []
    with pytest.raises(KeyboardInterrupt):
        probe(load_probe_config(config), tmp_path / "runs")
    told.answer, told.asked = answer, []
    found = probe(load_probe_config(config), tmp_path / "runs")
    assert list(found.outcomes) == list(whole)
    assert len(told.asked) == 23 - at // told.batch * told.batch


def test_requests_that_failed_are_asked_again(config, told, tmp_path):
    from mmtune.probe.clients import Reply

    good = told.ask
    told.ask = lambda sent: [Reply("", "timed out", 4) for _ in sent]
    found = probe(load_probe_config(config), tmp_path / "runs")
    assert all(o.error for o in found.outcomes)
    told.ask = good
    found = probe(load_probe_config(config), tmp_path / "runs")
    assert [o.reply for o in found.outcomes] == ["yes"] * 23
    lines = (tmp_path / "runs/mine/replies.jsonl").read_text().splitlines()
    assert len(lines) == 23


def test_replies_can_be_replayed(config, told, tmp_path, monkeypatch):
    first = probe(load_probe_config(config), tmp_path / "runs")
    monkeypatch.undo()
    path = tmp_path / "runs/mine/replies.jsonl"
    again = load_probe_config(
        config, ["name=again", f"models={{told: {{client: replay, path: {path}}}}}"]
    )
    second = probe(again, tmp_path / "runs")
    assert [o.as_json() for o in second.outcomes] == [o.as_json() for o in first.outcomes]
    other = load_probe_config(
        config,
        ["name=other", f"models={{told: {{client: replay, path: {path}}}}}", "asking.examples=1"],
    )
    third = probe(other, tmp_path / "runs")
    assert {o.style for o in third.outcomes if o.error} == {"few-shot"}


def test_folders_of_something_else_are_left_alone(config, told, tmp_path):
    probe(load_probe_config(config), tmp_path / "runs")
    with pytest.raises(RunError, match="another way of asking"):
        probe(load_probe_config(config, ["asking.examples=1"]), tmp_path / "runs")
    (tmp_path / "runs/x").mkdir()
    (tmp_path / "runs/x/mine.txt").write_text("mine")
    with pytest.raises(RunError, match="holds no probe"):
        probe(load_probe_config(config, ["name=x"]), tmp_path / "runs")


def test_the_command_shows_an_edits_side_effects(config, tmp_path, monkeypatch, capsys):
    """The same tiny model as it is and under a drastic edit: the table says where they differ."""
    mllm = tiny("llava")
    request = EditRequest("w5 w9", "w40", None, "r")
    edit = FineTune(FineTuneOptions(region="language", lr=0.1, steps=30)).edit(mllm, [request])
    edit.save(tmp_path / "edit")
    monkeypatch.setattr("editing.loading.mllm_of", lambda options, loaded=None: mllm)
    command = ["probe", str(config), "--edit", str(tmp_path / "edit"), "--runs", str(tmp_path)]
    assert main([*command, "--lmms-eval", str(tmp_path / "lmms")]) == 0
    assert "difference to told" in capsys.readouterr().out.replace("\n", " ")
    lines = [json.loads(x) for x in (tmp_path / "mine/replies.jsonl").read_text().splitlines()]
    by_client = {c: [x["reply"] for x in lines if x["client"] == c] for c in ("told", "told-edit")}
    assert len(by_client["told"]) == len(by_client["told-edit"]) == 23
    assert by_client["told"] != by_client["told-edit"]
    page = (tmp_path / "mine/report.html").read_text()
    assert page.count("data:image/jpeg") >= 3
    assert "told-edit" in page
    looks_right(tmp_path / "mine/report.html", tmp_path)
    results = json.loads((tmp_path / "lmms/told_results.json").read_text())
    assert results["n-samples"]["small_simple"]["effective"] == 6
    samples = (tmp_path / "lmms/told_samples_small_simple.jsonl").read_text().splitlines()
    assert len(samples) == 6
    assert json.loads(samples[0])["resps"] == [[by_client["told"][0]]]


def test_accuracy_of_a_model_that_always_says_yes(config, told, tmp_path):
    found = probe(load_probe_config(config), tmp_path / "runs")
    numbers = numbers_of(found)
    assert numbers.cells["told", "simple", "all"].accuracy.value == 0.5
    assert numbers.cells["told", "simple", "all"].yes == 1.0
    titles = [title for title, _, _ in tables(found, numbers)]
    assert titles == ["Accuracy", "What a style changes", "How they answer"]


def test_popes_own_numbers_stand_beside_ours(config, told, tmp_path):
    lines = [
        {"question_id": n, "image": f"{n}.png", "text": "Is there a dog?", "label": label}
        for n, label in enumerate(("yes", "no", "no", "no"))
    ]
    file = tmp_path / "coco_pope_random.json"
    file.write_text("\n".join(map(json.dumps, lines)))
    changes = [f"items={{format: pope, path: {file}}}", "styles=[simple]"]
    told.answer = lambda sent: "Hard to say"
    found = probe(load_probe_config(config, changes), tmp_path / "runs")
    by_title = {title: rows for title, _, rows in tables(found, numbers_of(found))}
    (row,) = by_title["As POPE's own script counts"]
    assert row[:2] == ["told", "simple"]
    assert row[2].startswith("25.0 [")
    assert row[3:] == ["25.0", "100.0", "40.0", "100.0"]
    (ours,) = by_title["How they answer"]
    assert ours[4:6] == ["100.0", "0.0"]  # not understood, and no yes
    assert any("POPE's own script" in note for note in notes(found))


def test_effects_of_an_edit_are_told_by_style_and_category(config, tmp_path, monkeypatch):
    """One model says yes, the edited one says no in the plain style alone."""
    from contextlib import contextmanager

    from mmtune.probe.page import render_page

    @contextmanager
    def client_of(name, options):
        plain = "Answer yes or no."
        yield Told(lambda sent: "no" if name == "edited" and plain in sent.text
                   and not sent.examples and "Look at" not in sent.text else "yes")  # fmt: skip

    monkeypatch.setattr(running, "client_of", client_of)
    models = "models={told: {model: {name: none}}, edited: {model: {name: none}}}"
    found = probe(load_probe_config(config, [models]), tmp_path / "runs")
    numbers = numbers_of(found)
    changed = {key: (p.n, p.better, p.worse, p.kept) for key, p in numbers.changed.items()}
    assert changed["edited", "simple", "all"] == (6, 3, 3, 0)
    assert changed["edited", "simple", "x"] == (3, 2, 1, 0)
    assert changed["edited", "few-shot", "y"] == (3, 0, 0, 1)
    assert len(changed) == 4 * 3
    (rows,) = [rows for title, _, rows in tables(found, numbers) if title == "What a model changes"]
    assert [row[:3] for row in rows] == [
        ["edited", "simple", "all"], ["edited", "simple", "x"], ["edited", "simple", "y"],
        *(["edited", style, "all"] for style in ("referring", "reasoning", "few-shot")),
    ]  # fmt: skip
    page = render_page(found, numbers, tmp_path / "runs/mine")
    assert "What changed against told" in page
    assert page.count("% kept") == 4 * 3


def test_failures_at_which_models_differ_are_shown_first(config, tmp_path, monkeypatch):
    from contextlib import contextmanager

    from mmtune.probe.page import render_page

    @contextmanager
    def client_of(name, options):
        yield Told(lambda sent: next(answers), batch=1)

    models = "models={told: {model: {name: none}}, edited: {model: {name: none}}}"
    answers = iter(["maybe"] * 6 + ["maybe", "maybe", "no", "maybe", "maybe", "yes"])
    monkeypatch.setattr(running, "client_of", client_of)
    found = probe(load_probe_config(config, [models, "styles=[simple]"]), tmp_path / "runs")
    page = render_page(found, numbers_of(found), tmp_path / "runs/mine")
    shown = re.findall(r'<span class="soft small">(\d)</span>', page)
    assert shown == ["2", "5", "0", "1", "3", "4"]


def test_every_mistake_is_told(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(
        "name: x\nitems: {format: pope}\nmodels: {a: {client: smoke}, b: {client: http, url: u}}\n"
        "styles: [simple, loud]\nasking: {examples: many}\n"
    )
    with pytest.raises(ConfigError) as error:
        load_probe_config(file)
    text = str(error.value)
    for part in ("items", "models.a.client", "models.b.model", "styles", "asking.examples"):
        assert part in text


def test_a_config_reads_back(config, tmp_path):
    found = load_probe_config(config, ["styles=[simple]", "asking.marks=[box]"])
    (tmp_path / "again.yaml").write_text(to_yaml(found))
    assert load_probe_config(tmp_path / "again.yaml") == found


KILLED = """
import os, sys
from mmtune.probe import running
from mmtune.probe.config import load_probe_config
from contextlib import contextmanager
from tests.probe.sets import Told
left = [int(sys.argv[3])]
def answer(sent):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), 9)
    return "yes"
@contextmanager
def client_of(name, options):
    yield Told(answer)
running.client_of = client_of
running.probe(load_probe_config(sys.argv[1]), __import__("pathlib").Path(sys.argv[2]))
"""


def test_a_killed_process_loses_no_line(config, told, tmp_path):
    whole = probe(load_probe_config(config), tmp_path / "whole").outcomes
    command = [sys.executable, "-c", KILLED, str(config), str(tmp_path / "runs"), "9"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": "."}, check=False)
    assert done.returncode == -9
    told.asked = []
    found = probe(load_probe_config(config), tmp_path / "runs")
    assert list(found.outcomes) == list(whole)
    assert len(told.asked) == 23 - 8
