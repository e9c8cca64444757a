"""The built-in set: the same files each time, and answers that the pictures bear out."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from mmtune.probe.made.canvas import COLOURS
from mmtune.probe.made.writing import MAKERS, write


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write(tmp_path_factory.mktemp("made"), 6, 0)


def pixels(made, item):
    return np.asarray(Image.open(made.images / item.images[0]))


def middle(image, colour):
    """(x, y) of the pixels of a colour."""
    ys, xs = np.nonzero((image == COLOURS[colour]).all(-1))
    return xs.mean(), ys.mean()


def test_the_same_seed_gives_the_same_bytes(made, tmp_path):
    again = write(tmp_path, 6, 0)
    assert again.items == made.items
    for path in sorted(tmp_path.rglob("*.*")):
        other = made.images / path.relative_to(tmp_path)
        assert (
            hashlib.sha256(path.read_bytes()).digest()
            == hashlib.sha256(other.read_bytes()).digest()
        )
    assert write(tmp_path / "other", 6, 1).items != made.items


def test_every_kind_is_there_and_says_that_it_was_made(made):
    assert "made by a script (seed 0)" in made.note
    assert len({item.subcategory for item in made.items}) >= 10
    assert len({item.id for item in made.items}) == len(made.items)
    assert len(MAKERS) == 7
    with pytest.raises(ValueError, match="each must be 1"):
        write(made.images / "x", 0, 0)


def test_places_are_where_the_answers_say(made):
    items = [i for i in made.items if i.category == "relative position"]
    assert len(items) == 12
    for item in items:
        image = pixels(made, item)
        named = [w for w in item.question.split() if w in COLOURS]
        (x0, y0), (x1, y1) = (middle(image, colour) for colour in named)
        holds = {
            "left": x0 < x1,
            "right": x0 > x1,
            "above": y0 < y1,
            "below": y0 > y1,
        }
        word = next(w for w in holds if w in item.question)
        assert item.answer == ("yes" if holds[word] else "no")
        for region in item.regions:
            x, y = middle(image, region.label.split()[0])
            left, top, right, bottom = (v * image.shape[0] for v in region.box)
            assert left < x < right
            assert top < y < bottom


def test_flips_have_the_other_answer(made):
    groups = {}
    for item in made.items:
        if item.relation:
            groups.setdefault((item.pair_id, item.relation), []).append(item.answer)
    assert len(groups) == 12
    for (_, relation), answers in groups.items():
        assert len(answers) > 1
        assert len(set(answers)) == (2 if relation == "flip" else 1)


def test_the_highest_bar_is_the_highest(made):
    for item in made.items:
        if item.subcategory == "charts":
            tops = {region.label: region.box[1] for region in item.regions}
            best = (min if "highest" in item.question else max)(tops, key=tops.get)
            assert item.answer == best


def test_as_many_circles_as_the_answer_says(made):
    items = [i for i in made.items if i.subcategory == "counting"]
    assert items
    for item in items:
        assert int(item.answer) == len(item.regions)
        ink = (pixels(made, item) != 255).any(-1).sum()
        one = np.pi * (0.1 * 224) ** 2
        assert ink / one == pytest.approx(int(item.answer), rel=0.1)


def test_texts_stand_in_their_boxes(made):
    items = [i for i in made.items if i.subcategory == "clean"]
    assert len(items) == 3
    for item in items:
        ys, xs = np.nonzero((pixels(made, item) < 128).all(-1))
        left, top, right, bottom = (v * 224 for v in item.regions[0].box)
        assert left - 1 <= xs.min()
        assert xs.max() <= right + 1
        assert top - 1 <= ys.min()
        assert ys.max() <= bottom + 1


def test_yes_and_no_are_as_frequent_for_presence(made):
    answers = [i.answer for i in made.items if i.subcategory == "presence"]
    assert answers.count("yes") == answers.count("no") == 6
