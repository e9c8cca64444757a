"""Every method and editor has a whole page, and it says what registry and suite say."""

from __future__ import annotations

import dataclasses

import pytest

from editing.meta.base import TrainedEditor
from editing.methods.base import editors
from mmtune import cli
from mmtune.conformance.methods import METHODS, matrix, refusals
from mmtune.reference.docstrings import COUNTS
from mmtune.reference.pages import editor_page, method_page
from mmtune.tuners.registry import methods


def whole(page):
    assert [block for block in page.body if block.equation], "no equation"
    assert page.count.startswith(COUNTS), "no count"
    assert "arXiv" in page.source[0]
    assert not [option.name for option in page.options if not option.text], "options without text"
    assert page.configs
    return True


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_method_has_a_whole_page(name):
    method = methods()[name]
    page = method_page(method)
    assert whole(page)
    assert (page.summary, page.source[0]) == (method.summary, method.source)
    assert len(page.source) > 1  # the paper's equation or section, and what differs
    assert [o.name for o in page.options] == [f.name for f in dataclasses.fields(method.options)]
    assert len(page.tried) == sum(case.method == name for case in METHODS.values())


@pytest.mark.parametrize("name", sorted(editors()))
def test_every_editor_has_a_whole_page(name):
    cls = editors()[name]
    page = editor_page(cls)
    assert whole(page)
    assert page.source[0] == cls.source
    own = [option.name for option in page.options if "." not in option.name]
    assert own == [field.name for field in dataclasses.fields(cls.options)]
    assert bool(page.notes) == issubclass(cls, TrainedEditor)


def test_pages_say_of_backbones_what_the_matrix_says():
    everywhere = next(iter(matrix().values()))
    for name, cells in matrix().items():
        works, refused = set(), set()
        for row in method_page(methods()[name]).tried:
            works |= set(everywhere) if row.works == "all" else set(row.works.split(", ")) - {""}
            refused |= {(backbone, why) for backbone, why in row.refuses}
        assert works == {backbone for backbone, there in cells.items() if there}
        told = {(b, why) for row, b, why in refusals() if METHODS[row].method == name}
        assert refused == told


def test_what_merges_says_so():
    said = {name: method_page(methods()[name]).notes[0] for name in ("lora", "prompt", "aurora")}
    assert "folds" in said["lora"]
    assert "never" in said["prompt"]
    assert "some settings" in said["aurora"]
    row = method_page(methods()["aurora"]).tried[0]
    assert row.merges.startswith("yes, but not on blip-retrieval")


@pytest.mark.parametrize("name", ["qlora", "adapter_fusion", "mend", "lora"])
def test_the_command_prints_the_whole_page(name, capsys):
    assert cli.main(["list", name]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    pages = [method_page(methods()[name])] if name in methods() else []
    pages += [editor_page(editors()[name])] if name in editors() else []
    for page in pages:
        texts = [block.text for block in page.body] + [page.count, *page.source, *page.notes]
        for text in texts:
            assert " ".join(text.split()) in printed
        for option in page.options:
            assert f" {option.name} {option.type.split()[0]}" in printed
        for config in page.configs:
            assert config in printed


def test_lora_is_a_method_and_an_editor(capsys):
    assert cli.main(["list", "lora"]) == 0
    printed = capsys.readouterr().out
    assert "lora (method)" in printed
    assert "lora (editor)" in printed


def test_unknown_names_are_answered_with_suggestions(capsys):
    for wrong, right in (("auroa", "aurora"), ("wize", "wise"), ("editor", "editors")):
        assert cli.main(["list", wrong]) == 2
        assert f"Did you mean {right!r}?" in capsys.readouterr().err


def test_the_table_of_editors(capsys):
    assert cli.main(["list", "editors"]) == 0
    printed = capsys.readouterr().out
    assert all(f"│ {name} " in printed for name in editors())


def test_the_table_of_backbones_says_what_ships_and_what_can_be_edited(capsys):
    from mmtune import zoo
    from tests.editing.tiny import MODELS, NEWER, stock

    assert cli.main(["list", "backbones"]) == 0
    lines = [line.strip("│ ").split("│") for line in capsys.readouterr().out.splitlines()]
    cells = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}
    edited = {name for name, rest in cells.items() if rest[-1:] == ["yes"]}
    assert edited == {stock(name)[1].family for name in (*MODELS, *NEWER)}
    for name in ("tiny-llava", "tiny-llava/mend", "tiny-diffusion", "tiny-clip"):
        assert f"zoo:{name}" in cells
    assert zoo.summary("tiny-clip") == "A CLIP of 8.3 M parameters for drawings of 96 px"
