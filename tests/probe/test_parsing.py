import pytest

from mmtune.probe.clients import Reply, Sent
from mmtune.probe.outcomes import distance, outcome_of
from mmtune.probe.parsing import final, parsed, popes
from tests.probe.sets import item

COLOURS = item("a", "blue", choices=("red", "blue", "dark red"))
POLAR = item("a", "yes")
WRITTEN = item("a", "Exit 12", fields={"exact_text": True})


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("B", "blue"),
        ("(b)", "blue"),
        ("B. blue", "blue"),
        ("The answer is B.", "blue"),
        ("Answer: (C)", "dark red"),
        ("It is blue, I think.", "blue"),
        ("dark red", "dark red"),
        ("a red one", "red"),
        ("A car that is blue", "blue"),
        ("I see a boat", None),
        ("red or blue", None),
        ("", None),
        ("green", None),
        ("A car that is green", None),
        ("I choose C, sir", "dark red"),
        ("Both look red at first.\nAnswer: B", "blue"),
    ],
)
def test_choices(reply, answer):
    assert parsed(COLOURS, reply).answer == answer


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("Yes", "yes"),
        ("no, it is not", "no"),
        ("No.", "no"),
        ("There isn't one", "no"),
        ("I know of nothing", None),
        ("a dog", None),
        ("First no, then... Answer: yes", "yes"),
    ],
)
def test_yes_and_no(reply, answer):
    assert parsed(POLAR, reply).answer == answer


def test_popes_parser_calls_everything_else_a_yes():
    assert popes(POLAR, "a dog") == "yes"
    assert popes(POLAR, "No, it is red") == "no"
    assert popes(POLAR, "I do not know. Yes") == "no"


def test_the_last_answer_counts():
    assert final("Answer: no. Wait.\nFinal answer: yes") == "yes"
    assert final("an answer to this question") == "an answer to this question"


def test_texts_are_compared_letter_by_letter():
    def of(reply):
        return outcome_of("m", "simple", WRITTEN, Sent("q"), Reply(reply))

    assert (of('"exit 12"').right, of("exit 12").errors) == (1, 1 / 7)
    close = of("Exit 72")
    assert (close.right, close.errors) == (0, 1 / 7)
    assert close.likeness == pytest.approx(6 / 7)
    far = of("something else altogether")
    assert (far.errors, far.likeness) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("a", "b", "d"), [("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("x", "x", 0)]
)
def test_distances(a, b, d):
    assert distance(a, b) == distance(b, a) == d


def test_reasoning_that_says_something_else():
    def of(reply):
        return outcome_of("m", "reasoning", POLAR, Sent("q"), Reply(reply)).contradicts

    assert of("I see no cat. Answer: yes") is True
    assert of("Yes, there is a cat.\nAnswer: yes") is False
    assert of("It is late. Answer: yes") is None
    assert of("yes") is None


def test_a_failed_request_is_not_wrong():
    found = outcome_of("m", "simple", POLAR, Sent("q"), Reply("", "timed out", 3))
    assert (found.right, found.error, found.tries) == (None, "timed out", 3)
