import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_builders import rewordings
from data_builders.rephrasing import candidates_of
from data_builders.rewordings import fault_of, kept_words, polished
from editing.audit.auditing import record_findings
from editing.audit.kinds import LONG
from editing.audit.rephrases import defects
from tests.editing.edit_items import DATA, item

ASKED = "What is the man holding?"


@pytest.mark.parametrize(
    ("source", "candidate"),
    [
        (ASKED, "Which object does the man hold?"),
        (ASKED, "What does the man have in his hand?"),
        ("Is there a dog?", "Can a dog be seen?"),
        ("Are there 2 dogs?", "Can one see two dogs?"),
        ("Are there two dogs?", "Do you see 2 dogs?"),
        ("Is the man not happy?", "Isn't the man happy?"),
        ("What does Anna hold?", "Which thing is Anna holding?"),
        ("Name what is drawn.", "What has been drawn?"),
        ("Name what is drawn.", "Say what has been drawn."),
        ("这是什么？", "这是哪种动物?"),
        ('What does "Stop" mean?', 'What is the meaning of "Stop"?'),
    ],
)
def test_a_rewording_may_do(source, candidate):
    assert fault_of(candidate, source, LONG) == ""


@pytest.mark.parametrize(
    ("source", "candidate", "reason"),
    [
        (ASKED, "I'm sorry, I can't help with that?", rewordings.REFUSED),
        (ASKED, "As an AI, I see no image?", rewordings.REFUSED),
        (ASKED, "what is  the man holding", rewordings.COPIED),
        (ASKED, "What is the 'man' holding ?!", rewordings.COPIED),
        (ASKED, "Which thing " + "the man now " * 8 + "holds?", rewordings.LONG),
        ("Name it.", "Say what the …", rewordings.CUT),
        (ASKED, "The man holds a bat.", rewordings.NO_QUESTION),
        (ASKED, "这个人拿着什么?", rewordings.LANGUAGE),
        (ASKED, "Что держит мужчина?", rewordings.LANGUAGE),
        (ASKED, "¿Qué sostiene el hombre?", rewordings.LANGUAGE),
        (ASKED, "Welches Ding hält der Mann?", rewordings.LANGUAGE),
        ("What does Anna hold?", "Which thing is she holding?", rewordings.LOST),
        ("Are there 3 dogs?", "Can any dogs be seen?", rewordings.LOST),
        ("What is in the left hand?", "What is in the right hand?", rewordings.LOST),
        ("Is the bus red?", "Is the bus yellow?", rewordings.LOST),
        ("Are there dogs?", "Are there 3 dogs here?", rewordings.NUMBER),
        ("Is he happy?", "Is he not happy?", rewordings.NEGATION),
        ("Why isn't he happy?", "Why is he so happy?", rewordings.NEGATION),
        (ASKED, '"Stop" is on what "sign"?"', rewordings.UNCLEAN),
        ("Say it.", 'Here is another: "Put it into words."', rewordings.UNCLEAN),
    ],
)
def test_what_is_no_rewording(source, candidate, reason):
    assert fault_of(candidate, source, LONG) == reason


PARTS = [
    '"',
    "the",
    "man",
    "holds",
    "sorry",
    "I'm",
    "here is another:",
    "“",
    "What",
    "?",
    "I cannot",
]


@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=8), st.sampled_from(["?", '?"']))
def test_what_is_taken_passes_the_audit(parts, end):
    text = " ".join(parts) + end
    if fault_of(text, ASKED, LONG) == "":
        found = record_findings(0, item() | {"src": ASKED, "rephrase": text})
        assert [one for one in found if one.field == "rephrase"] == []


@pytest.mark.parametrize("name", ["vqa_train", "vqa_eval"])
def test_most_published_rephrases_can_be_had_and_none_with_a_defect(name):
    """A third of them are quoted, listed or talked about, as their chat model wrote them."""
    path = DATA / "mmedit" / f"{name}.json"
    if not path.is_file():
        pytest.skip("the published files are not here")
    items = json.loads(path.read_text(encoding="utf-8"))
    dirty, mended, usable = 0, 0, 0
    for one in items:
        source, written = one["src"], one["rephrase"]
        texts = [polished(text, source) for text in candidates_of(written)]
        good = [text for text in texts if not fault_of(text, source, LONG)]
        assert not any(defects(text, source) for text in good)
        dirty += bool(defects(written, source))
        mended += bool(defects(written, source) and good)
        usable += bool(good)
    assert dirty > 0.1 * len(items)
    assert mended > 0.85 * dirty
    assert usable > 0.93 * len(items)


def test_a_persons_wording_is_trusted_in_its_meaning_but_not_in_its_form():
    assert fault_of("Which thing is held?", "What does Anna hold?", LONG, meaning=False) == ""
    assert fault_of('"A?"', "B?", LONG, meaning=False) == rewordings.UNCLEAN


def test_polish():
    assert polished("which dog is it", "What dog is this?") == "Which dog is it?"
    assert polished("The dog runs", "What runs?") == "The dog runs"  # no question
    assert polished("which dog", "name the dog") == "which dog"


def test_kept_words():
    assert kept_words("Which thing holds the man?", "What is the man holding?") == 1
    assert kept_words("Which dog?", "What is the man holding?") == 0
    assert kept_words("Where do men hold it?", "What is the man holding?") == 0.5
    assert kept_words("What can be seen here?", "What is this?") == 1  # no content to lose
    assert kept_words("What time is it?", "What is this?") == 0
