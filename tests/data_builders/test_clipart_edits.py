"""Edit records about drawings, made with answers that are known."""

from __future__ import annotations

import json

import pytest

from data_builders.clipart_edits import SPLITS, build, known_facts, main, told, write
from data_builders.general_facts import facts, is_right
from editing.audit import audit
from editing.datasets import load_records
from mmtune.zoo.tiny_llava.questions import drawings

ROWS = [row for name, part in SPLITS["test"][:2] for row in drawings(name, part)]


def answers(wrong):
    """Right answers, but "xyzzy" where `wrong` says so; facts in a sentence."""

    def answer(probes):
        every = facts()
        return [
            f"It is {every[p.question]}."
            if p.question in every
            else ("xyzzy" if wrong(p) else p.answer.title())
            for p in probes
        ]

    return answer


def test_every_record_edits_a_mistake_and_its_neighbours_are_what_they_should_be():
    built = build(answers(lambda p: "picture" in p.question), limit=12, rows=ROWS)
    assert len(built.items) == 12
    assert built.counterfactual == 0
    names = {f"images/{row['id'].removesuffix('.svg').replace('/', '-')}": row for row in ROWS}
    for item in built.items:
        row, other, kept = (
            names[item[k].rpartition(".")[0]] for k in ("image", "image_rephrase", "m_loc")
        )
        answer = {"name": row["thing"].noun, "kind": row["thing"].kind}[item["kind"]]
        assert (item["pred"], item["alt"]) == ("xyzzy", answer)
        assert item["rephrase"] != item["src"]
        assert other["id"] != row["id"]
        assert other["thing"] == row["thing"]
        assert kept["thing"] != row["thing"]
        assert item["m_loc_a"].lower() != answer
        assert is_right(item["loc_ans"], facts()[item["loc"]])


def test_it_loads_audits_clean_and_is_the_same_again(tmp_path):
    wrong = answers(lambda p: "picture" in p.question)
    paths = []
    for name in ("one", "two"):
        built = build(wrong, limit=12, seed=3, rows=ROWS)
        paths.append(write(built, tmp_path / name, "test", "note\n"))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    records = load_records(paths[0], progress=False).records
    assert len(records) == 12
    found = audit(str(paths[0]), images=str(tmp_path / "one"))
    assert not found.findings
    other = build(wrong, limit=12, seed=4, rows=ROWS)
    assert json.loads(paths[0].read_text()) != other.items


def test_a_model_that_is_right_gives_no_edits_but_counterfactual_ones():
    right = answers(lambda p: False)
    assert build(right, limit=5, rows=ROWS[:60]).items == []
    built = build(right, limit=5, rows=ROWS, counterfactual=True)
    assert built.counterfactual == 5
    assert all(i["counterfactual"] and i["pred"].lower() != i["alt"] for i in built.items)


def test_facts_of_the_splits_are_apart_and_wrong_ones_are_left_out():
    right = answers(lambda p: False)
    test, train = (known_facts(right, split) for split in ("test", "train"))
    assert len(test) + len(train) == len(facts())
    assert not set(test) & set(train)
    assert known_facts(lambda probes: ["no idea"] * len(probes), "test") == []
    with pytest.raises(ValueError, match="no question of general knowledge"):
        build(lambda probes: ["no idea"] * len(probes), rows=ROWS)


def test_a_word_is_a_word():
    assert is_right("The answer is Au.", "Au")
    assert not is_right("Australia", "Au")
    assert is_right("it is 100 degrees", "100")
    assert not is_right("1000", "100")


def test_each_question_is_asked_once():
    import random

    found = list(told(ROWS[:20], answers(lambda p: False), random.Random(0)))
    assert len(found) == 40
    assert len({(t.row["id"], t.question.kind) for t in found}) == 40
    assert all(t.right for t in found)


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--counterfactual" in capsys.readouterr().out
