"""Files of outcomes: what is read is what was written, and half a file is no file."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_builders.samples import Candidate, Keeper, Rejected, Sample
from data_builders.shards import (
    Part,
    Task,
    cut,
    digest_of,
    finished,
    kept_in,
    outcomes_until,
    read_outcomes,
    shard_file,
    write_shard,
)
from mmtune.runs import RunError

FULL = Sample(
    "a/1", "what?\nis it \ud800 \u2028", "source:x.jpg", ("a", "a", "b"), "b", "c", ("d",), "dog",
    "say", (Candidate("made:1.png", "p", "m", 2**62, {"clip": 0.1 + 0.2}, "dull"),), "made:1.png",
    Keeper("q", "a"), Keeper("q", "a", "image:y", "7"), "train", "CC", {"kind": "name", "n": [1]},
)  # fmt: skip
OUTCOMES = [
    FULL,
    Rejected("b", "right"),
    Sample("c", "?"),
    Rejected("d", "broken", "é", True),
    Rejected("e", "right"),
]


def write(folder, outcomes=OUTCOMES, index=0):
    return write_shard(folder, index, "select", "key", "given", outcomes)


def test_what_is_read_is_what_was_written(tmp_path):
    shard = write(tmp_path)
    assert read_outcomes(shard_file(tmp_path, 0)) == OUTCOMES
    assert kept_in(shard_file(tmp_path, 0)) == [FULL, OUTCOMES[2]]
    assert (shard.samples, shard.kept) == (5, 2)
    assert (shard.rejected, shard.faults) == ({"right": 2}, {"broken": 1})
    assert finished(tmp_path, 0, "key", "given") == shard
    assert os.listdir(tmp_path) == ["shard-00000.jsonl"]


def test_a_shard_of_another_stage_or_of_other_samples_is_not_finished(tmp_path):
    write(tmp_path)
    assert finished(tmp_path, 0, "other", "given") is None
    assert finished(tmp_path, 0, "key", "other") is None
    assert finished(tmp_path, 1, "key", "given") is None


def test_no_part_of_a_file_passes_for_the_whole(tmp_path):
    write(tmp_path)
    path = shard_file(tmp_path, 0)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert finished(tmp_path, 0, "key", "given") is None, size
    with pytest.raises(RunError, match="missing or damaged"):
        read_outcomes(path)
    lines = whole.split(b"\n")
    for left_out in range(1, len(lines) - 1):
        path.write_bytes(b"\n".join(lines[:left_out] + lines[left_out + 1 :]))
        assert finished(tmp_path, 0, "key", "given") is None
        path.write_bytes(b"\n".join(lines[:left_out] + lines[left_out - 1 :]))
        assert finished(tmp_path, 0, "key", "given") is None


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 7))
@settings(deadline=None)
def test_cutting_keeps_every_sample_once_and_in_order(counts, size):
    parts = [Part(str(n), 0, count) for n, count in enumerate(counts)]
    tasks = cut(parts, size)
    every = [(p.file, n) for t in tasks for p in t.parts for n in range(p.start, p.stop)]
    assert every == [(part.file, n) for part in parts for n in range(part.stop)]
    assert [task.samples for task in tasks[:-1]] == [size] * (len(tasks) - 1)
    assert all(0 < task.samples <= size for task in tasks)
    assert [task.index for task in tasks] == list(range(len(tasks)))
    assert [Task.of_json(task.as_json()) for task in tasks] == tasks


def test_a_task_loads_kept_samples_of_several_files(tmp_path):
    for index in range(3):
        write(
            tmp_path,
            [Sample(f"{index}{n}", "?") if n != 1 else OUTCOMES[1] for n in range(4)],
            index,
        )
    files = [str(shard_file(tmp_path, index)) for index in range(3)]
    task = Task(0, (Part(files[0], 2, 3), Part(files[1], 0, 3), Part(files[2], 0, 1)))
    assert [sample.id for sample in task.load()] == ["03", "10", "12", "13", "20"]


@given(st.lists(st.lists(st.booleans(), max_size=5), max_size=6), st.integers(1, 12))
def test_a_limit_ends_with_the_sample_that_reaches_it(shards, limit):
    outcomes = [[Sample("a", "?") if kept else OUTCOMES[1] for kept in own] for own in shards]
    found = [one for own in outcomes_until(iter(outcomes), limit) for one in own]
    every = [one for own in outcomes for one in own]
    assert found == every[: len(found)]
    kept = sum(isinstance(one, Sample) for one in found)
    if sum(isinstance(one, Sample) for one in every) >= limit:
        assert kept == limit
        assert isinstance(found[-1], Sample)
    else:
        assert found == every
    assert [o for own in outcomes_until(iter(outcomes), None) for o in own] == every


def test_samples_are_named_by_their_content():
    assert digest_of([FULL]) == digest_of([Sample.of_json(json.loads(json.dumps(FULL.as_json())))])
    assert digest_of([FULL]) != digest_of([FULL.with_(target="d")])
    assert digest_of([FULL, OUTCOMES[2]]) != digest_of([OUTCOMES[2], FULL])


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write(tmp_path)
    before = shard_file(tmp_path, 0).read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, OUTCOMES[:2])
    assert os.listdir(tmp_path) == ["shard-00000.jsonl"]
    assert shard_file(tmp_path, 0).read_bytes() == before
