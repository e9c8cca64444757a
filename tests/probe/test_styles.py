import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmtune.probe.items import Region
from mmtune.probe.styles import (
    COLOUR,
    MARKS,
    STYLES,
    StyleOptions,
    drawn_on,
    exemplars,
)
from tests.probe.sets import WHOLE, item, item_set

OPTIONS = StyleOptions()


def opened(data):
    return np.asarray(Image.open(io.BytesIO(data)))


@given(
    regions=st.lists(
        st.tuples(st.floats(0, 0.6), st.floats(0, 0.6), st.floats(0.3, 0.4)), min_size=1, max_size=3
    ),
    mark=st.sampled_from(MARKS),
    size=st.tuples(st.integers(30, 90), st.integers(30, 90)),
)
@settings(max_examples=30, deadline=None)
def test_marks_are_drawn_where_regions_are(regions, mark, size):
    picture = Image.new("RGB", size, "white")
    found = np.asarray(
        drawn_on(picture, [Region((x, y, x + s, y + s)) for x, y, s in regions], mark)
    )
    red = (found == COLOUR).all(-1)
    assert red.any()
    assert not (np.asarray(picture) == COLOUR).all(-1).any()
    if mark in ("box", "circle"):
        rows, columns = np.nonzero(red)
        edges = [
            (min(x for x, *_ in regions), max(x + s for x, _, s in regions), columns, size[0]),
            (min(y for _, y, _ in regions), max(y + s for _, y, s in regions), rows, size[1]),
        ]
        for low, high, at, side in edges:
            assert low * (side - 1) - 1 <= at.min()
            assert at.max() <= high * (side - 1) + 1


def test_an_item_without_a_region_cannot_be_referred_to(tmp_path):
    seen, bare = item("a", regions=(WHOLE,)), item("b")
    items = item_set(tmp_path, [seen, bare])
    sent = STYLES["referring"](seen, items, OPTIONS)
    plain = STYLES["simple"](seen, items, OPTIONS)
    assert sent is not None
    assert plain is not None
    assert (opened(sent.images[0]) != opened(plain.images[0])).any()
    assert STYLES["referring"](bare, items, OPTIONS) is None
    assert sent == STYLES["referring"](seen, items, OPTIONS)


def test_texts_say_how_to_answer(tmp_path):
    asked = item("a", "blue", choices=("red", "blue"))
    items = item_set(tmp_path, [asked])
    simple = STYLES["simple"](asked, items, OPTIONS)
    assert simple.text == (
        "Question a?\nA. red\nB. blue\nAnswer with the letter of the right choice."
    )
    thought = STYLES["reasoning"](asked, items, OPTIONS)
    assert "Answer:" in thought.text
    assert thought.most > simple.most


@given(seed=st.integers(0, 50), count=st.integers(0, 4))
@settings(max_examples=25, deadline=None)
def test_examples_never_show_the_item_its_image_or_its_pair(seed, count, tmp_path_factory):
    folder = tmp_path_factory.mktemp("items")
    items = [
        item(f"{i}", image=f"{'abcd'[i % 4]}.png", pair_id=f"p{i // 2}", category="xy"[i % 2])
        for i in range(16)
    ]
    known = item_set(folder, items)
    (folder / "d.png").write_bytes((folder / "a.png").read_bytes())  # a copy by another name
    options = StyleOptions(examples=count, seed=seed)
    for one in items:
        shown = exemplars(one, known, options)
        own = known.picture(one).read()
        assert len(shown) <= count
        assert one.id not in {s.id for s in shown}
        assert all(s.pair_id != one.pair_id and s.category == one.category for s in shown)
        assert all(known.picture(s).read() != own for s in shown)


def test_few_shot_shows_questions_with_their_answers(tmp_path):
    items = item_set(tmp_path, [item(f"{i}", answer="no", image=f"{i}.png") for i in range(5)])
    sent = STYLES["few-shot"](items.items[0], items, OPTIONS)
    assert [e.answer for e in sent.examples] == ["no"] * 3
    assert all(e.text.startswith("Question ") and e.images for e in sent.examples)
    alone = item_set(tmp_path, [item("x", image="x.png")])
    assert STYLES["few-shot"](alone.items[0], alone, OPTIONS) is None


@pytest.mark.parametrize("style", STYLES)
def test_the_same_item_is_asked_the_same_way(style, tmp_path):
    items = item_set(tmp_path, [item(f"{i}", image=f"{i}.png", regions=(WHOLE,)) for i in range(5)])
    first, again = (STYLES[style](items.items[0], items, OPTIONS) for _ in range(2))
    assert first.digest() == again.digest()
    others = [STYLES[style](one, items, OPTIONS).digest() for one in items.items]
    assert len(set(others)) == 5
