from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from editing.audit import KINDS, audit, fix, rephrases
from editing.audit.kinds import UNREADABLE
from editing.audit.mending import fix_file
from editing.datasets import FIELDS
from tests.editing.edit_items import item, write
from tests.editing.test_audit import LEFT_OUT, MENDED, SORRY, counts
from tests.editing.test_datasets import good_items, json_values, near_items

SOURCE = "Where is the cat?"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ('"In what place is the cat?"', "In what place is the cat?"),
        ('""In what place is the cat?""', "In what place is the cat?"),
        ('"Where is the cat?"\n\n"In what place is it?"', "In what place is it?"),
        ("Where is the cat?\n\nRewritten as:\nIn what place is it?", "In what place is it?"),
        ('Where is the cat?\nSorry, I cannot.\n"Where does it sit?"', "Where does it sit?"),
        ("In what place\n is the cat?", "In what place is the cat?"),
        ('"Where is the cat?" can be rewritten as "Where does it sit?"', "Where does it sit?"),
        ('Rewritten question: "Where does it sit?"', "Where does it sit?"),
        ('Can you rephrase this question: "Where is the cat?"', SOURCE),
        ('Can you rephrase this question: "Where is that cat?"', "Where is that cat?"),
        ('"Where is the cat?"\n"where is the cat"', SOURCE),
        # Quotation marks that belong to the question stay.
        ('Where is the cat called "Mia"?', 'Where is the cat called "Mia"?'),
        ('Where does the sign say "Where is she?"', 'Where does the sign say "Where is she?"'),
        ('"Where is the cat called "Mia" now?"', 'Where is the cat called "Mia" now?'),
    ],
)
def test_the_question_is_taken_out_of_what_is_around_it(text, want):
    assert rephrases.mend(text, SOURCE)[0] == want
    assert rephrases.mend(want, SOURCE) == (want, [])


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I cannot provide a rewritten question.", True),
        ("I\u2019m sorry, that is offensive.", True),
        ('"As an AI language model, I do not see images."', True),
        ("Please note: as an AI language model I do not.", True),
        ("I can't help with that.", True),
        ("Is the man sorry?", False),
        ("Who said sorry, and why?", False),
        ("I cannoli: what is it?", False),
    ],
)
def test_refusals(text, refused):
    assert rephrases.is_refusal(text) is refused


def test_duplicates_of_a_record_that_is_left_out_stay():
    items = [item(0, pred="0 cups"), item(0), item(0, alt="8 cups"), item(1)]
    fixed = fix(items)
    assert fixed.items == [items[1], items[3]]
    assert {c.record: [f.kind for f in c.because] for c in fixed.changes} == {
        0: ["nothing to edit"],
        2: ["duplicate edit"],
    }


def test_what_mending_makes_of_a_record_decides_whether_it_is_left_out():
    items = [
        item(0, rephrase='"What is on shelf 0?"'),
        item(1, rephrase='" "'),
        item(2, rephrase=f'"{SORRY}"'),
        item(3),
        item(3, src=" What is on shelf 3? "),
    ]
    fixed = fix(items)
    assert fixed.items == [item(3)]
    assert {c.record: c.because[0].kind for c in fixed.changes} == {
        0: "rephrase equals src",
        1: "empty field",
        2: "refusal",
        4: "duplicate edit",
    }
    assert fixed.changes[0].mends[0].after == "What is on shelf 0?"


def test_kept_kinds_are_left_as_they_are():
    items = [item(0, rephrase="What is on shelf 0?", alt="3 cups "), item(1, rephrase='"Which?"')]
    keep = frozenset({"rephrase equals src", "rephrase in quotes"})
    assert fix(items, keep).items == [items[0] | {"alt": "3 cups"}, items[1]]
    assert fix(items, keep | {"outer blanks"}).changes == []


def test_an_interrupted_copy_leaves_the_old_one(tmp_path, monkeypatch):
    path, out = write(tmp_path / "data.json", [item(0, alt="x ")]), tmp_path / "clean.json"
    out.write_text("old")

    def stopped(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        fix_file(path, out, overwrite=True)
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clean.json", "data.json"]


pieces = st.sampled_from(
    ['"', '" ', ' "', "\n", "\x0b", "\u2028", " ", "a", "What?", "src", "?", ".", ":", "Rewritten:",
     "Rewritten question: ", "I'm sorry", "as an AI language model", "can be rewritten as", "_",
     "A" * 130, "w " * 26]
)  # fmt: skip
messy_texts = st.lists(pieces, max_size=9).map("".join)
messy_items = st.fixed_dictionaries(
    dict.fromkeys(FIELDS, messy_texts)
    | {"src": st.just("src") | messy_texts, "image": st.sampled_from("ab")},
    optional={"port_new": st.lists(st.dictionaries(
        st.sampled_from(["port_q", "port_a", "port_edit_a"]), messy_texts), max_size=2)},
)  # fmt: skip
keeps = st.sets(st.sampled_from([k for k in MENDED + LEFT_OUT if k not in UNREADABLE]), max_size=2)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(messy_items | good_items | near_items | json_values, max_size=4),
    st.just(set()) | keeps,
)
def test_mending_is_idempotent_and_leaves_none_of_the_mended_kinds(tmp_path_factory, items, keep):
    folder = tmp_path_factory.mktemp("any")
    before = json.dumps(items)
    fixed = fix(items, frozenset(keep))
    assert json.dumps(items) == before
    again = fix(fixed.items, frozenset(keep))
    assert again.changes == []
    assert json.dumps(again.items) == json.dumps(fixed.items)
    audited = audit(write(folder / "data.json", items))
    assert audited.records == len(items)
    assert set(counts(audited)) <= set(KINDS)
    left = audit(write(folder / "clean.json", fixed.items))
    assert set(counts(left)) & {*MENDED, *LEFT_OUT} <= keep
    # What is not mentioned is copied as it was.
    changed = {change.record for change in fixed.changes}
    kept = [json.dumps(i) for n, i in enumerate(items) if n not in changed]
    mended = [c.becomes for c in fixed.changes if c.becomes is not None]
    assert [json.dumps(i) for n, i in enumerate(fixed.items) if n not in mended] == kept
