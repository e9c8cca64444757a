from __future__ import annotations

import logging

import pytest

from mmtune.data import DataError, DataOptions, ImageBytes, Record, SourceOptions
from mmtune.data.checking import check, load_data
from mmtune.data.readers import read
from mmtune.data.records import ImageFile, Question, VideoFile
from tests.data.pictures import encoded, write_json, write_pictures, write_tar


@pytest.fixture
def broken(tmp_path):
    """One good record, and one of each kind of bad one."""
    inside = tmp_path / "in"
    inside.mkdir()
    write_pictures(inside, ["good.jpg", "../outside.jpg"])
    whole = encoded(size=(64, 64), kind="JPEG")
    (inside / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (inside / "empty.jpg").write_bytes(b"")
    (inside / "text.jpg").write_bytes(b"<html>not found</html>")
    (inside / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    entries = [
        {"image": "good.jpg", "caption": "fine"},
        {"image": "nowhere.jpg", "caption": "x"},
        {"image": "cut.jpg", "caption": "x"},
        {"image": "../outside.jpg", "caption": "x"},
        {"image": str(tmp_path / "outside.jpg"), "caption": "x"},
        {"image": "link.jpg", "caption": "x"},
        {"image": "empty.jpg", "caption": "x"},
        {"image": "text.jpg", "caption": "x"},
        {"image": "good.jpg", "caption": "  "},
        {"image": "good.jpg"},
        {"image": 5, "caption": "x"},
        {"image": "good.jpg", "caption": 3},
        "no mapping",
        {"image": "nul\0byte.jpg", "caption": "x"},
    ]
    return write_json(inside / "data.json", entries)


REASONS = {
    "missing image": 2,
    "truncated image": 1,
    "image outside root": 3,
    "zero-size image": 1,
    "not an image": 1,
    "record without caption": 2,
    "malformed record": 3,
}


def test_raise_lists_every_problem_with_file_and_record(broken):
    data = DataOptions(train=SourceOptions("blip", broken), on_error="raise")
    with pytest.raises(DataError) as caught:
        load_data(data, progress=False)
    text = str(caught.value)
    assert text.startswith("13 problem(s) in the data (")
    for reason, count in REASONS.items():
        assert f"{count} {reason}" in text
    for number in range(1, 14):
        assert f"{broken}, record {number}: " in text
    assert "record 1: missing image: no file 'nowhere.jpg'" in text
    assert "data.on_error: skip" in text


def test_skip_goes_on_and_counts(broken, caplog):
    data = DataOptions(train=SourceOptions("blip", broken), on_error="skip")
    with caplog.at_level(logging.WARNING):
        checked = load_data(data, progress=False)["train"]
    assert [r.captions for r in checked.records] == [("fine",)]
    assert checked.skipped == REASONS
    assert checked.files == [broken]
    assert "left out 13 of 14 records" in caplog.text


def test_problems_of_all_splits_come_together(tmp_path):
    write_pictures(tmp_path, ["a.jpg"])
    train = write_json(tmp_path / "train.json", [{"image": "b.jpg", "caption": "x"}])
    test = write_json(tmp_path / "test.json", [{"image": "a.jpg", "caption": ""}])
    data = DataOptions(train=SourceOptions("blip", train), test=SourceOptions("blip", test))
    with pytest.raises(DataError) as caught:
        load_data(data, progress=False)
    assert {p.reason for p in caught.value.problems} == {"missing image", "record without caption"}


def test_twenty_are_listed_and_all_counted():
    bad = [Record(ImageBytes(b"x"), ("c",), str(i), f"f, record {i}") for i in range(57)]
    with pytest.raises(DataError) as caught:
        check(bad, "raise", progress=False)
    lines = str(caught.value).splitlines()
    assert lines[0] == "57 problem(s) in the data (57 not an image):"
    assert len([line for line in lines if line.startswith("  f, record")]) == 20
    assert "  and 37 more" in lines


def test_nothing_left_is_an_error_even_with_skip():
    bad = [Record(ImageBytes(b"x"), ("c",), "0", "f, record 0")]
    with pytest.raises(DataError, match="all were left out"):
        check(bad, "skip", progress=False)
    with pytest.raises(DataError, match="the source is empty"):
        check([], "skip", progress=False)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("karpathy", '{"images": [', r"line 1: not JSON"),
        ("karpathy", "[1, 2]", r"expected a mapping with a list \"images\".*got a list"),
        ("karpathy", '{"annotations": []}', r"got a mapping with keys 'annotations'"),
        ("blip", '{"images": []}', r"expected a list of .*got a mapping with keys 'images'"),
        ("blip", "[" * 100_000, r"not JSON"),
        ("blip", b"\xff\xfe\x00", r"not UTF-8"),
        ("flickr30k", "a;b;c\n1;2;3\n", r"line 1: .*expected a header"),
        ("flickr30k", "", r"line 1: .*expected a header"),
        ("parquet", "PAR1 not really", r"no parquet"),
        ("webdataset", "no tar at all", r"no tar"),
        ("datasets", "nothing", r"not a data set"),
    ],
)
def test_a_file_that_is_not_what_it_says_always_stops(tmp_path, kind, content, message, on_error):
    path = tmp_path / "file.bin"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    data = DataOptions(train=SourceOptions(kind, str(path)), on_error=on_error)
    with pytest.raises(DataError, match=message) as caught:
        load_data(data, progress=False)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["karpathy", "blip", "flickr30k", "folder", "parquet"])
def test_a_missing_file_is_named(tmp_path, kind):
    with pytest.raises(DataError, match="no-such-file"):
        list(read(SourceOptions(kind, str(tmp_path / "no-such-file"))))


def test_bad_lines_of_metadata(tmp_path):
    write_pictures(tmp_path, ["a.png"])
    text = '{"file_name": "a.png", "text": "ok"}\n{"file_name": \n[1]\n{"text": "x"}\n'
    (tmp_path / "metadata.jsonl").write_text(text)
    found = list(read(SourceOptions("folder", str(tmp_path))))
    assert [getattr(p, "reason", None) for p in found] == [
        None,
        "not JSON",
        "malformed record",
        "malformed record",
    ]
    assert [p.where.rsplit(", ", 1)[1] for p in found] == [f"line {i}" for i in range(1, 5)]


def test_a_shard_that_ends_early_keeps_what_is_whole(tmp_path):
    members = []
    for key in "abc":
        members += [(f"{key}.txt", key.encode()), (f"{key}.png", encoded(size=(80, 80)))]
    path = write_tar(tmp_path / "s.tar", members)
    content = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(content[:3200])  # inside the picture of the second record
    checked = check(read(SourceOptions("webdataset", path)), "skip", progress=False)
    assert [r.id for r in checked.records] == ["a"]
    assert sum(checked.skipped.values()) >= 1


def test_shard_records_without_image_or_caption(tmp_path):
    members = [("a.txt", b"x"), ("b.png", encoded()), ("c.png", encoded()), ("c.json", b"{]")]
    found = list(read(SourceOptions("webdataset", write_tar(tmp_path / "s.tar", members))))
    assert [p.reason for p in found] == [
        "missing image",
        "record without caption",
        "malformed record",
    ]
    assert "record 'c'" in found[2].where


def test_parquet_without_the_columns_lists_those_there_are(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"picture": [b"x"], "text": ["y"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="got picture, text"):
        list(read(SourceOptions("parquet", str(tmp_path / "a.parquet"))))


def test_a_source_of_another_kind_than_the_task_needs_is_refused(tmp_path, monkeypatch):
    image = ImageFile(str(tmp_path), "a.png")
    for item, kind, text in [
        (Question(image, "what?", ("cat",), "1", "f"), Record, "gives questions, the task needs c"),
        (Record(image, ("a cat",), "1", "f"), Question, "gives captions, the task needs questions"),
        (Record(VideoFile(str(tmp_path), "a.mp4"), ("a",), "1", "f"), Record, "gives videos"),
    ]:
        monkeypatch.setattr("mmtune.data.checking.read", lambda *_, item=item: iter([item]))
        options = DataOptions(train=SourceOptions(format="blip", path="x.json"))
        with pytest.raises(DataError, match=text) as raised:
            load_data(options, progress=False, kind=kind)
        assert "data.train (blip)" in str(raised.value)
