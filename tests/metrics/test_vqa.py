"""VQA accuracy: official scores, one by one, and what follows from its definition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmtune.metrics.vqa import accuracy, exact_match, processed

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "vqa_accuracy.json").read_text())


@pytest.mark.parametrize("case", range(60))
def test_official_score(case):
    golden = GOLDEN[case]
    assert accuracy(golden["pred"], golden["answers"]) == pytest.approx(golden["score"], abs=1e-12)


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1)])
def test_a_tenth_of_the_annotators_each_is_left_out_in_turn(matches, score):
    answers = ["cat"] * matches + ["dog"] * (10 - matches)
    assert accuracy("cat", answers) == pytest.approx(score)


def test_fewer_annotators_agree_in_full_where_all_others_do():
    assert accuracy("The Circle.", ["circle"]) == 1
    assert accuracy("square", ["circle"]) == 0
    for count in (2, 3, 4, 9):
        assert accuracy("circle", ["circle"] * count) == 1
    assert accuracy("circle", ["circle", "square"]) == pytest.approx(0.5)
    assert accuracy("circle", ["circle", "circle", "square"]) == pytest.approx(2 / 3)


def test_exact_match_is_with_what_most_said():
    answers = ["two"] * 4 + ["2"] * 3 + ["three"] * 3
    assert exact_match("2", answers) == 1
    assert exact_match("3", answers) == 0
    assert exact_match("3", ["three", "2"]) == 1  # between equals, either


def test_processing():
    assert processed("a man, 5,000 cats & the dogs!") == "man 5000 cats & dogs"
    assert processed("ice-cream/cake") == "ice cream cake"
    assert processed("youve couldnt've couldn'tve lets") == "you've couldn't've couldn't've lets"


def test_a_question_without_answers_has_no_score():
    with pytest.raises(ValueError, match="without answers"):
        accuracy("yes", [])
