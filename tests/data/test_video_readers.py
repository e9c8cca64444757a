from __future__ import annotations

import json

import pytest

from mmtune.data import DataError, Problem, Record, SourceOptions
from mmtune.data.readers import read, source_files
from mmtune.data.records import Question, VideoFile
from tests.data.pictures import write_json


def write_lines(path, items):
    path.write_text("".join(json.dumps(i) + "\n" for i in items), encoding="utf-8")
    return str(path)


def listed(kind, path, images=None, role="train"):
    source = SourceOptions(kind, path, images=None if images is None else str(images))
    return list(read(source, role))


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_msrvtt_lines_of_one_clip_are_one_record(tmp_path):
    videos = tmp_path / "videos"
    touch(videos, "video1.mp4", "video2.avi", "video3.webm", "video4.mkv", "video5/1.jpg")
    lines = [
        {"clip_name": f"video{i}", "retrieval_key": f"ret{i}", "caption": f" one {i}"}
        for i in range(1, 7)
    ]
    lines += [{"clip_name": "video1", "caption": "two 1"}]
    path = write_lines(tmp_path / "train.jsonl", lines)
    found = listed("msrvtt", path, videos)
    names = ["video1.mp4", "video2.avi", "video3.webm", "video4.mkv", "video5", "video6.mp4"]
    assert [r.image for r in found] == [VideoFile(str(videos), name) for name in names]
    assert [r.captions for r in found[:2]] == [("one 1", "two 1"), ("one 2",)]
    assert [r.id for r in found] == [f"video{i}" for i in range(1, 7)]
    assert found[1].where == f"{path}, line 2"
    assert found[1].fields == {"retrieval_key": "ret2"}
    assert source_files(SourceOptions("msrvtt", path)) == [path]
    # Without `images`, beside the file.
    assert listed("msrvtt", path)[0].image == VideoFile(str(tmp_path), "video1.mp4")


def test_msrvtt_as_a_list(tmp_path):
    touch(tmp_path, "video7.mp4", "sub/video8.mp4")
    items = [
        {"video": "video7.mp4", "caption": ["one", "two"]},
        {"video": "sub/video8.mp4", "caption": "three"},
    ]
    found = listed("msrvtt", write_json(tmp_path / "test.json", items))
    assert [(r.image.name, r.captions) for r in found] == [
        ("video7.mp4", ("one", "two")),
        ("sub/video8.mp4", ("three",)),
    ]
    assert found[0].where.endswith("test.json, record 0")


def test_didemo_sentences_become_a_paragraph_and_endings_may_differ(tmp_path):
    touch(tmp_path, "1@N00_5.mov", "2@N00_6.mp4", "3@N00_7.avi.mp4")
    lines = [
        {"clip_name": "1@N00_5.mov", "caption": ["a dog runs", "it sits."]},
        {"clip_name": "2@N00_6.avi", "caption": "a cat"},
        {"clip_name": "3@N00_7.avi", "caption": "a bird"},
        {"clip_name": "2@N00_6.avi", "caption": "it sleeps"},
    ]
    found = listed("didemo", write_lines(tmp_path / "a.jsonl", lines))
    assert [(r.image.name, r.captions) for r in found] == [
        ("1@N00_5.mov", ("a dog runs it sits.",)),
        ("2@N00_6.mp4", ("a cat it sleeps",)),
        ("3@N00_7.avi.mp4", ("a bird",)),
    ]
    released = [{"video": "2@N00_6.avi", "description": t, "times": [[0, 1]]} for t in ("x", "y")]
    found = listed("didemo", write_json(tmp_path / "train_data.json", released))
    assert [r.captions for r in found] == [("x y",)]


def test_questions_about_videos(tmp_path):
    touch(tmp_path, "video6513.mp4")
    asked = {"question": " what runs ? ", "answer": "dog", "answer_type": "what"}
    lines = [
        {**asked, "video_id": "video6513"},
        {**asked, "video_id": 6513, "id": 158_581, "answer": ["dog", " dogs "]},
        {**asked, "video_id": "video6513", "answer": None},
    ]
    path = write_lines(tmp_path / "qa.jsonl", lines)
    found = listed("video_qa", path, role="test")
    assert all(isinstance(q, Question) for q in found)
    assert {q.image for q in found} == {VideoFile(str(tmp_path), "video6513.mp4")}
    assert [q.answers for q in found] == [("dog",), ("dog", "dogs"), ()]
    assert [q.id for q in found] == ["0", "158581", "2"]
    assert found[0].question == "what runs ?"
    assert found[0].fields == {"answer_type": "what"}
    assert found[2].where == f"{path}, line 3"
    as_list = listed("video_qa", write_json(tmp_path / "qa.json", lines), role="test")
    assert [(q.image, q.answers) for q in as_list] == [(q.image, q.answers) for q in found]
    *_, problem = listed("video_qa", path)
    assert (problem.where, problem.reason) == (f"{path}, line 3", "question without answers")


def test_bad_lines_name_file_line_and_field(tmp_path):
    path = tmp_path / "bad.jsonl"
    good = {"clip_name": "a", "caption": "b"}
    lines = [
        json.dumps(good),
        '{"clip_name": ',
        "[1]",
        '{"caption": "x"}',
        '{"clip_name": "a"}',
        '{"clip_name": "a", "caption": 5}',
        '{"clip_name": ["a"], "caption": "x"}',
        '{"video_id": "", "caption": "x"}',
        "",
        '{"clip_name": "../../etc/passwd", "caption": "x"}',
    ]
    path.write_text("\n".join(lines))
    for kind in ("msrvtt", "didemo"):
        found = listed(kind, str(path))
        assert [isinstance(f, Record) for f in found] == [True, *[False] * 7, True]
        problems = [f for f in found if isinstance(f, Problem)]
        assert [p.where for p in problems] == [f"{path}, line {i}" for i in range(2, 9)]
        assert [p.reason for p in problems] == [
            "not JSON",
            "malformed record",
            "malformed record",
            "record without caption",
            "malformed record",
            "malformed record",
            "malformed record",
        ]
        assert "clip_name is None, expected the name of a clip" in problems[2].text
        assert "video_id is ''" in problems[6].text


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ({"answer": "x", "video_id": "v"}, "question is None, expected text"),
        ({"question": "q", "answer": 3, "video_id": "v"}, "answer is '3', expected a text"),
        ({"question": "q", "answer": "x"}, "clip_name is None"),
        ({"question": "q", "answer": "x", "video_id": True}, "video_id is True"),
    ],
)
def test_bad_questions_are_named(tmp_path, item, text):
    path = write_lines(tmp_path / "qa.jsonl", [item])
    (problem,) = listed("video_qa", path)
    assert isinstance(problem, Problem)
    assert problem.where == f"{path}, line 1"
    assert text in problem.text


@pytest.mark.parametrize("kind", ["msrvtt", "didemo", "video_qa"])
def test_files_that_are_not_what_they_say(tmp_path, kind):
    with pytest.raises(DataError, match="no-such-file"):
        listed(kind, str(tmp_path / "no-such-file.jsonl"))
    with pytest.raises(DataError, match=r"expected a list of mappings .*got a mapping"):
        listed(kind, write_json(tmp_path / "a.json", {"videos": []}))
