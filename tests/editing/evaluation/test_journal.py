"""A journal holds whole lines, wherever the process that wrote it was killed."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from editing.evaluation.journal import Journal

LINES = st.lists(st.dictionaries(st.text(), st.none() | st.integers() | st.text()), max_size=5)


@settings(max_examples=40, deadline=None)
@given(LINES, st.integers(0, 10_000), st.text())
def test_a_cut_file_keeps_its_whole_lines_and_goes_on(tmp_path_factory, lines, cut, extra):
    path = tmp_path_factory.mktemp("journal") / "lines.jsonl"
    journal = Journal(path)
    for line in lines:
        journal.add(line)
    assert Journal(path).lines == journal.lines == lines
    data = path.read_bytes() if lines else b""
    path.write_bytes(data[:cut])
    again = Journal(path)
    assert again.lines == lines[: data[:cut].count(b"\n")]
    again.add({"more": extra})
    assert Journal(path).lines == [*again.lines[:-1], {"more": extra}]
    assert all(json.loads(text) is not None for text in path.read_text("utf-8").split("\n")[:-1])


def test_lines_beyond_a_count_are_left_out(tmp_path):
    journal = Journal(tmp_path / "lines.jsonl")
    for number in range(5):
        journal.add({"number": number})
    journal.keep(7)
    assert len(Journal(journal.path).lines) == 5
    journal.keep(2)
    assert Journal(journal.path).lines == journal.lines == [{"number": 0}, {"number": 1}]


def test_a_number_that_json_lacks_survives(tmp_path):
    journal = Journal(tmp_path / "lines.jsonl")
    journal.add({"nll": float("inf"), "text": "\ud800\u2028"})
    assert Journal(journal.path).lines == [{"nll": float("inf"), "text": "\ud800\u2028"}]
