"""The arguments of `mmtune ui`: what goes together, and what is said where it does not."""

from __future__ import annotations

import importlib.util
import socket
import sys

import pytest

from mmtune import zoo
from mmtune.cli import USER_ERROR, build_parser, main
from mmtune.config import load_config, to_yaml
from mmtune.ui import app, commands, problems
from mmtune.ui.problems import PageProblem, note, problem
from tests.ui.adapters import random_adapter


def refused(capsys, *arguments):
    """The message with which the command refuses its arguments."""
    assert main(["ui", *arguments]) == USER_ERROR
    return capsys.readouterr().err


def searching(*arguments):
    return commands._search(build_parser().parse_args(["ui", *map(str, arguments)]))


def test_without_gradio_a_sentence_says_what_to_install(capsys, monkeypatch):
    stock = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gradio" else stock(name)
    )
    said = refused(capsys, "--model", "zoo:tiny-clip", "--images", "zoo:clipart-animals")
    assert said == f"error: {problems.MISSING}\n"
    assert "pip install 'mmtune[ui]'" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to show"),
        (["--model", "zoo:tiny-clip"], "--model needs --images"),
        (["--images", "."], "--images needs --model"),
        (["--adapter", "."], "--adapter needs --model"),
        (["--run", ".", "--model", "zoo:tiny-clip"], "not both"),
        (["--run", "nothing"], "nothing is no finished run"),
        (["--model", "zoo:tiny-clip", "--images", "nothing"], "there is no folder nothing"),
        (["--model", "zoo:tiny-clip", "--images", "zoo:nothing"], "the zoo has no data set"),
        (["--model", "zoo:nothing", "--images", "zoo:clipart-animals"], "the zoo has no model"),
        (["--mllm", "zoo:tiny-clip"], "must write text"),
        (["--mllm", "x", "--port", "65536"], "--port must be in 0..65535, got 65536"),
    ],
)
def test_what_does_not_go_together_is_told(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_it_listens_on_this_machine_alone_unless_told_otherwise():
    options = build_parser().parse_args(["ui"])
    assert (options.host, options.port) == ("127.0.0.1", 7860)


def test_a_run_names_model_pictures_and_adapter(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    config = load_config("demo/retrieval", ["data.test.name=clipart-food", "data.test.limit=5"])
    (run / "config.yaml").write_text(to_yaml(config))
    random_adapter(zoo.load("tiny-clip"), run / "adapter")
    found = searching("--run", run)
    assert [side.title for side in found.sides] == ["Base: zoo:tiny-clip", "With adapter: lora"]
    assert len(found.records) == 5
    assert all("food" in record.where for record in found.records)
    other = searching("--run", run, "--images", "zoo:clipart-animals", "--adapter", tmp_path)
    assert len(other.records) == 120
    assert f"{tmp_path} holds no adapter" in other.problem


def test_a_port_that_is_taken_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PageProblem, match=rf"127.0.0.1:{port}.*--port"):
            app.serve(app.page(), "127.0.0.1", port)


def test_messages_are_text_and_never_markup():
    assert "<script>" not in problem("<script>alert(1)</script>") + note("<script>")
    assert "one<br>two" in problem("one\ntwo")
    assert note("") == ""
    assert "KeyError" in problem(KeyError())


def test_gradio_tells_nobody_that_it_runs():
    from gradio import analytics

    assert not analytics.analytics_enabled()
    assert not app.page().analytics_enabled


def test_the_command_line_does_without_gradio():
    import subprocess

    code = "import sys; from mmtune.cli import build_parser; build_parser(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert not {"gradio", "torch", "httpx"} & set(done.stdout.split())
