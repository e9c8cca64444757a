"""A journal holds whole lines, wherever the process that wrote it was killed."""

from __future__ import annotations

import json
import os
import signal

import pytest
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


@given(LINES, st.sets(st.integers(0, 4)))
@settings(max_examples=20, deadline=None)
def test_lines_that_are_not_wanted_are_left_out(tmp_path_factory, lines, left_out):
    journal = Journal(tmp_path_factory.mktemp("journal") / "lines.jsonl")
    for number, line in enumerate(lines):
        journal.add({"number": number, "line": line})
    journal.retain(lambda line: line["number"] not in left_out)
    wanted = [{"number": n, "line": one} for n, one in enumerate(lines) if n not in left_out]
    assert Journal(journal.path).lines == journal.lines == wanted
    journal.add({"more": 1})
    assert Journal(journal.path).lines == journal.lines == [*wanted, {"more": 1}]


def five(path):
    journal = Journal(path)
    for number in range(5):
        journal.add({"number": number})
    return journal


@pytest.mark.parametrize("at", ["fdopen", "fsync", "chmod", "replace"])
def test_what_fails_while_lines_are_left_out_changes_nothing(at, tmp_path, monkeypatch):
    journal = five(tmp_path / "lines.jsonl")
    before = journal.path.read_bytes()

    def full(*arguments, **named):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, at, full)
        with pytest.raises(OSError, match="no space left"):
            journal.retain(lambda line: line["number"] == 3)
    assert [path.name for path in tmp_path.iterdir()] == ["lines.jsonl"]
    assert journal.path.read_bytes() == before
    assert journal.lines == Journal(journal.path).lines == [{"number": n} for n in range(5)]


@pytest.mark.parametrize("at", ["fdopen", "fsync", "chmod", "replace"])
def test_a_process_killed_while_lines_are_left_out_loses_none(at, tmp_path):
    journal = five(tmp_path / "lines.jsonl")
    before = journal.path.read_bytes()
    child = os.fork()
    if not child:
        setattr(os, at, lambda *arguments, **named: os.kill(os.getpid(), signal.SIGKILL))
        try:
            journal.retain(lambda line: line["number"] == 3)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert journal.path.read_bytes() == before
    journal.retain(lambda line: line["number"] == 3)
    assert Journal(journal.path).lines == [{"number": 3}]


def test_a_number_that_json_lacks_survives(tmp_path):
    journal = Journal(tmp_path / "lines.jsonl")
    journal.add({"nll": float("inf"), "text": "\ud800\u2028"})
    assert Journal(journal.path).lines == [{"nll": float("inf"), "text": "\ud800\u2028"}]
