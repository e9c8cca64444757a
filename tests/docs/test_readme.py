"""Commands in the README's code blocks are commands that there are."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from tests.docs.loaders import loader

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
SHELL = [
    line.strip().removeprefix("$ ")
    for kind, text in BLOCKS
    if kind in ("", "sh", "bash", "shell", "console")
    for line in re.sub(r"\\\n\s*", "", text).splitlines()
]
COMMANDS = [line for line in SHELL if line.startswith("mmtune ")]
TARGETS = [line for line in SHELL if line.startswith("make ")]
PYTHON = [text for kind, text in BLOCKS if kind in ("python", "py")]
ADDING = (  # what the blocks of "Adding to it" use
    "typing.ClassVar", "editing.changes.Delta", "editing.methods.base.Editor",
    "editing.methods.finetune.FineTuneOptions", "editing.regions.parameters_of",
    "editing.weight_edits.WeightEdit", "mmtune.tuners.registry.Method",
    "mmtune.tuners.registry.config_of", "mmtune.tuners.registry.options_of",
    "mmtune.tuners.sited.SitedConfig", "mmtune.tuners.sited.SitedTuner",
)  # fmt: skip


YAML = [text for kind, text in BLOCKS if kind == "yaml"]


def placeholders(text):
    """What a reader is meant to replace, such as … or <name>, as one word."""
    return re.sub(r"…|\.\.\.|<[^>]*>", "X", text)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses_and_its_config_loads(command):
    from mmtune.cli import build_parser
    from mmtune.config import find_config

    words = shlex.split(placeholders(command), comments=True)[1:]
    options, rest = build_parser().parse_known_args(words)
    assert all("=" in text and not text.startswith("-") for text in rest), rest
    config = getattr(options, "config", None)
    if config and "X" not in config and "*" not in config and not config.startswith("my"):
        assert find_config(config)
        loader(options.command)(config, [*options.overrides, *rest])


@pytest.mark.parametrize("text", YAML)
def test_config_loads(text, tmp_path):
    from mmtune.compare.config import is_comparison, load_comparison
    from mmtune.config import load_config

    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    assert (load_comparison if is_comparison(file) else load_config)(file)


@pytest.mark.parametrize("command", TARGETS)
def test_make_target_exists(command):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in shlex.split(command, comments=True)[1:]:
        if "=" not in word:
            assert re.search(rf"^{re.escape(word)}:", makefile, flags=re.MULTILINE), word


@pytest.mark.parametrize("code", PYTHON)
def test_python_block_is_python_and_its_names_can_be_imported(code):
    import ast
    import importlib.util

    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            ("mmtune", "editing")
        ):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                place = f"{node.module}.{alias.name}"
                assert hasattr(module, alias.name) or importlib.util.find_spec(place), place


def test_the_code_for_adding_a_method_a_backbone_and_an_editor_runs(monkeypatch):
    """The three blocks are executed; the editor's edit lowers the loss, and is undone."""
    import torch

    import mmtune.backbones
    from editing.requests import EditRequest
    from tests.editing.tiny import tiny

    monkeypatch.setattr(mmtune.backbones, "_REGISTERED", [])
    names = {"mmtune": mmtune}
    for place in ADDING:
        module, _, name = place.rpartition(".")
        names[name] = getattr(importlib.import_module(module), name)
    part = README[README.index("## Adding to it") : README.index("## What ships")]
    blocks = re.findall(r"^```python\n(.*?)^```", part, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec", dont_inherit=True), names)
    assert mmtune.backbones.families()["mine"] is names["Mine"]
    assert [method.name for method in names["METHODS"]] == ["mine"]
    (editor,) = names["EDITORS"]
    mllm, requests = tiny("llava"), [EditRequest("w5 w9", "w40", None, "r")]
    edit = editor(editor.options(lr=1.0)).edit(mllm, requests)
    with torch.no_grad():
        before = mllm.nll(mllm.batch(requests))
        with edit.applied(mllm):
            assert mllm.nll(mllm.batch(requests)) < before
        assert torch.equal(mllm.nll(mllm.batch(requests)), before)
