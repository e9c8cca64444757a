from __future__ import annotations

import json

import pytest

from mmtune.data import DataError, Record, SourceOptions
from mmtune.data.images import load_image
from mmtune.data.readers import expand_braces, read, source_files
from tests.data.pictures import encoded, write_json, write_pictures, write_tar


def records(role="train", **source):
    found = list(read(SourceOptions(**source), role))
    assert all(isinstance(r, Record) for r in found), found
    for r in found:
        assert load_image(r.image).mode == "RGB"
    return found


def karpathy_file(folder):
    write_pictures(folder, ["val2014/a.jpg", "val2014/b.jpg", "train2014/c.jpg", "train2014/d.jpg"])
    rows = [("a", "val", "val2014"), ("b", "restval", "val2014"), ("c", "train", "train2014")]
    rows.append(("d", "test", "train2014"))
    images = [
        {
            "filename": f"{name}.jpg",
            "filepath": where,
            "split": split,
            "cocoid": 100 + i,
            "sentences": [{"raw": f" {name} one"}, {"raw": f"{name} two"}],
        }
        for i, (name, split, where) in enumerate(rows)
    ]
    return write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})


def test_karpathy_splits_and_restval(tmp_path):
    path = karpathy_file(tmp_path)
    train = records(format="karpathy", path=path)
    assert [r.captions for r in train] == [("b one", "b two"), ("c one", "c two")]
    assert [r.id for r in train] == ["101", "102"]
    assert train[0].where == f"{path}, record 1"
    assert train[0].fields["split"] == "restval"
    assert [r.id for r in records(format="karpathy", path=path, restval=False)] == ["102"]
    assert [r.id for r in records("val", format="karpathy", path=path)] == ["100"]
    assert [r.id for r in records("val", format="karpathy", path=path, split="test")] == ["103"]
    with pytest.raises(DataError, match=r"no image of split 'tset'; there are restval, test, tr"):
        records(format="karpathy", path=path, split="tset")


def test_images_root_and_limit(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    write_pictures(tmp_path / "images", ["a.png", "b.png"])
    entries = [{"image": "a.png", "caption": "x"}, {"image": "b.png", "caption": "y"}]
    path = write_json(tmp_path / "annotations" / "train.json", entries)
    source = {"format": "blip", "path": path, "images": str(tmp_path / "images")}
    assert len(records(**source)) == 2
    assert len(records(**source, limit=1)) == 1


def test_blip_joins_the_captions_of_an_image(tmp_path):
    write_pictures(tmp_path, ["a.jpg", "b.jpg"])
    entries = [
        {"image": "a.jpg", "caption": "first", "image_id": 7},
        {"image": "b.jpg", "caption": ["other", "more"], "image_id": 0},
        {"image": "a.jpg", "caption": "second", "image_id": 7},
    ]
    found = records(format="blip", path=write_json(tmp_path / "train.json", entries))
    assert [(r.id, r.captions) for r in found] == [
        ("7", ("first", "second")),
        ("0", ("other", "more")),
    ]


def test_flickr30k_released_csv_with_its_broken_row(tmp_path):
    write_pictures(tmp_path, ["1.jpg", "2.jpg"])
    path = tmp_path / "results.csv"
    path.write_text(
        "image_name| comment_number| comment\n"
        '1.jpg| 0| A man says "hi, you" .\n'
        "1.jpg| 1| Another one .\n"
        "2.jpg| 4   A dog runs .\n"
        "2.jpg| 0| A cat .\n"
    )
    found = list(read(SourceOptions("flickr30k", str(path))))
    assert found[0].captions == ('A man says "hi, you" .', "Another one .")
    assert str(found[1]) == f"{path}, line 4: malformed record: 2 fields, expected 3"
    assert found[2].captions == ("A cat .",)


def test_flickr30k_comma_csv_with_quotes_and_split_and_json(tmp_path):
    write_pictures(tmp_path, ["1.jpg", "2.jpg"])
    path = tmp_path / "captions.csv"
    path.write_text('image,caption,split\n1.jpg,"a, b",train\n2.jpg,c,test\n')
    assert [r.captions for r in records(format="flickr30k", path=str(path))] == [("a, b",)]
    assert [r.id for r in records("test", format="flickr30k", path=str(path))] == ["2.jpg"]
    document = {
        "images": [{"filename": "1.jpg", "split": "test", "sentences": [{"raw": "karpathy"}]}]
    }
    flickr = write_json(tmp_path / "dataset_flickr30k.json", document)
    assert records("test", format="flickr30k", path=flickr)[0].captions == ("karpathy",)


def test_folder_with_and_without_splits(tmp_path):
    write_pictures(tmp_path, ["a.png", "b.png", "val/c.png"])
    lines = [{"file_name": "a.png", "text": "one", "by": "me"}]
    lines.append({"file_name": "b.png", "captions": ["two", "three"]})
    text = "\n".join(map(json.dumps, lines)) + "\n\n"
    (tmp_path / "metadata.jsonl").write_text(text)
    (tmp_path / "val" / "metadata.jsonl").write_text('{"file_name": "c.png", "caption": "four"}')
    found = records(format="folder", path=str(tmp_path))
    assert [r.captions for r in found] == [("one",), ("two", "three")]
    assert found[0].fields == {"by": "me"}
    assert found[1].where.endswith("metadata.jsonl, line 2")
    assert records("val", format="folder", path=str(tmp_path))[0].captions == ("four",)


@pytest.mark.parametrize("kind", ["struct", "bytes", "path"])
def test_parquet_image_columns(tmp_path, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_pictures(tmp_path, ["a.png"])
    image = {
        "struct": {"bytes": encoded(), "path": "x.png"},
        "bytes": encoded(),
        "path": "a.png",
    }[kind]
    rows = [
        {"image": image, "captions": ["one", "two"], "id": "i0", "title": "t"},
        {"image": image, "captions": ["three"], "id": "i1", "title": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "part-0.parquet")
    for path in (tmp_path, tmp_path / "part-0.parquet", tmp_path / "part-*.parquet"):
        found = records(format="parquet", path=str(path))
        assert [r.captions for r in found] == [("one", "two"), ("three",)]
        assert [(r.id, r.fields["title"]) for r in found] == [("i0", "t"), ("i1", None)]
        assert source_files(SourceOptions("parquet", str(path))) == [
            str(tmp_path / "part-0.parquet")
        ]


def shard(path, keys, mode="w"):
    members = []
    for key in keys:
        members += [(f"{key}.json", json.dumps({"caption": f"json {key}", "n": 1}).encode())]
        members += [(f"{key}.jpg", encoded(kind="JPEG"))]
    members += [("p/last.1.png", encoded()), ("p/last.txt", b" text wins \n")]
    return write_tar(path, members, mode)


@pytest.mark.parametrize(("ending", "mode"), [("tar", "w"), ("tar.gz", "w:gz")])
def test_webdataset_shards(tmp_path, ending, mode):
    shard(tmp_path / f"s-00.{ending}", ["a", "b"], mode)
    members = [("d.png", encoded()), ("d.txt", b"second shard")]
    write_tar(tmp_path / f"s-01.{ending}", members, mode)
    pattern = str(tmp_path / f"s-{{00..01}}.{ending}")
    found = list(read(SourceOptions("webdataset", pattern)))
    assert [getattr(r, "captions", None) for r in found] == [
        ("json a",),
        ("json b",),
        None,  # "p/last.1.png" ends in "1.png", which is no image's ending
        ("second shard",),
    ]
    assert found[0].fields["n"] == 1
    assert load_image(found[1].image).size == (12, 10)
    with pytest.raises(DataError, match=r"s-02"):
        list(read(SourceOptions("webdataset", str(tmp_path / f"s-{{00..02}}.{ending}"))))


def test_brace_patterns():
    assert expand_braces("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_braces("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
    assert expand_braces("plain.tar") == ["plain.tar"]


def test_datasets_saved_to_disk(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": encoded(), "path": None}] * 2, "text": ["one", "two"]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(str(tmp_path / "flat"))
    flat = records(format="datasets", path=str(tmp_path / "flat"))
    assert [r.captions for r in flat] == [("one",), ("two",)]
    both = datasets.DatasetDict({"train": data, "validation": data.select([1])})
    both.save_to_disk(str(tmp_path / "both"))
    val = records("val", format="datasets", path=str(tmp_path / "both"))
    assert [r.captions for r in val] == [("two",)]
    with pytest.raises(DataError, match=r"no split 'test'; there are train, validation"):
        records("test", format="datasets", path=str(tmp_path / "both"))


def test_zoo_resolves_by_name_and_split(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from mmtune import zoo

    rows = [{"image": {"bytes": encoded(), "path": "a"}, "caption": "one"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "clip-val.parquet")
    monkeypatch.setattr(
        zoo, "data_path", lambda name, split: tmp_path / f"{name}-{split}.parquet", raising=False
    )
    source = SourceOptions("zoo", name="clip")
    assert [r.captions for r in read(source, "val")] == [("one",)]
    assert source_files(source, "val") == [str(tmp_path / "clip-val.parquet")]


def test_zoo_names_in_braces_are_read_one_after_the_other():
    one = records(format="zoo", name="clipart-animals", split="test")
    two = records(format="zoo", name="clipart-food", split="test")
    both = records(format="zoo", name="clipart-{animals,food}", split="test")
    assert [r.id for r in both] == [r.id for r in one + two]


def test_what_the_zoo_does_not_have_is_refused_with_what_it_has():
    with pytest.raises(DataError, match=r"zoo:clipart-animal: not in the zoo: .*clipart-animals"):
        records(format="zoo", name="clipart-animal")
    with pytest.raises(DataError, match=r"no split 'dev'; it has .*train"):
        records(format="zoo", name="clipart-animals", split="dev")
