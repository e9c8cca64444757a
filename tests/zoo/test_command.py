"""The command lines of the recipes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mmtune.zoo.tiny_clip.command import begin, recipe_parser


@dataclass(frozen=True)
class Recipe:
    """Numbers of a recipe."""

    seed: int = 0
    learning_rate: float = 0.5


def test_every_number_of_a_recipe_is_an_option():
    parser = recipe_parser("a.module", "What it does.", Recipe)
    given = vars(parser.parse_args(["--out=a", "--teachers=b", "--learning-rate=2", "--device=x"]))
    assert given == {
        "out": Path("a"), "teachers": Path("b"), "icons": None, "device": "x", "seed": 0,
        "learning_rate": 2.0,
    }  # fmt: skip


def test_only_a_recipe_with_teachers_asks_for_them(capsys):
    with pytest.raises(SystemExit):
        recipe_parser("a.module", None, Recipe).parse_args(["--out=a"])
    assert "required: --teachers" in capsys.readouterr().err
    parser = recipe_parser("a.module", None, Recipe, teachers=False)
    assert "teachers" not in vars(parser.parse_args(["--out=a"]))
    with pytest.raises(SystemExit):
        parser.parse_args(["--out=a", "--teachers=b"])


def test_the_seed_decides_what_is_drawn(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch._dynamo.config, "suppress_errors", False)

    def drawn(seed):
        generator = begin(Recipe(seed), torch.device("cpu"))
        return torch.rand(4), torch.rand(4, generator=generator)

    first, again, other = drawn(3), drawn(3), drawn(4)
    for one, two, three in zip(first, again, other, strict=True):
        assert torch.equal(one, two)
        assert not torch.equal(one, three)
