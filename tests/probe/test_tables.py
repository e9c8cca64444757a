"""What is counted over which outcomes."""

from __future__ import annotations

import pytest

from mmtune.probe.config import ItemOptions, ProbeConfig
from mmtune.probe.outcomes import Outcome
from mmtune.probe.running import Probed
from mmtune.probe.styles import StyleOptions
from mmtune.probe.tables import effect_rows, numbers_of
from tests.probe.sets import item, item_set


def probed(folder, styles, right):
    """Two models and four items, two of each category.

    Args:
        folder: of the pictures.
        styles: that were asked.
        right: (model, style) -> for each item whether it was answered rightly.
    """
    items = item_set(
        folder, [item(n, image=f"{n}.png", category="xxyy"["abcd".index(n)]) for n in "abcd"]
    )
    config = ProbeConfig("p", 0, ItemOptions(), {"old": None, "new": None}, styles, StyleOptions())
    outcomes = [
        Outcome(model, style, n, "q", "d", "yes", right=r)
        for (model, style), every in right.items()
        for n, r in zip("abcd", every, strict=True)
    ]
    return Probed(config, items, outcomes, dict.fromkeys(styles, 0))


@pytest.mark.parametrize("styles", [("few-shot", "simple"), ("few-shot", "reasoning")])
def test_a_models_change_is_counted_by_style_and_shown_in_the_plain_one(styles, tmp_path):
    plain = "simple" if "simple" in styles else "few-shot"
    (other,) = set(styles) - {plain}
    right = {
        ("old", plain): (1, 1, 0, 0),
        ("new", plain): (0, 0, 0, 1),
        ("old", other): (0, 0, 0, 0),
        ("new", other): (1, 1, 1, 1),
    }
    asked = probed(tmp_path, styles, right)
    numbers = numbers_of(asked)
    found = {key: (p.n, p.better, p.worse) for key, p in numbers.changed.items()}
    assert found == {
        ("new", plain, "all"): (4, 1, 2),
        ("new", plain, "x"): (2, 0, 2),
        ("new", plain, "y"): (2, 1, 0),
        ("new", other, "all"): (4, 4, 0),
        ("new", other, "x"): (2, 2, 0),
        ("new", other, "y"): (2, 2, 0),
    }
    _, rows = effect_rows(asked, numbers)
    shown = {(plain, "all"), (plain, "x"), (plain, "y"), (other, "all")}
    assert {(row[1], row[2]) for row in rows} == shown
    assert len(rows) == len(shown)


def test_every_category_has_its_own_cells(tmp_path):
    right = {("old", "simple"): (1, 1, 0, 1), ("new", "simple"): (0, 1, 0, 0)}
    cells = numbers_of(probed(tmp_path, ("simple",), right)).cells
    assert {key: (c.accuracy.value, c.accuracy.n) for key, c in cells.items()} == {
        ("old", "simple", "all"): (0.75, 4),
        ("old", "simple", "x"): (1.0, 2),
        ("old", "simple", "y"): (0.5, 2),
        ("new", "simple", "all"): (0.25, 4),
        ("new", "simple", "x"): (0.5, 2),
        ("new", "simple", "y"): (0.0, 2),
    }
