"""The builder of easy-vqa on a small wheel made in place."""

import io
import json
import zipfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_builders.easy_vqa import EasyVqaError, compact_png, content, kind_of, main

QUESTIONS = {
    "train": [
        ["what is the blue shape?", "circle", 0],
        ["is there a circle?", "yes", 0],
        ["what color is the triangle?", "red", 1],
        ["is no teal shape present?", "yes", 1],
        ["does the image not contain a circle?", "no", 2],
    ],
    "test": [["is a gray shape present?", "yes", 0]],
}
SPLITS = ("train", "val", "test")


def png(seed):
    draw = np.random.default_rng(seed)
    pixels = np.full((64, 64, 3), 240, np.uint8)
    pixels[20:40, 10:50] = draw.integers(0, 255, (20, 40, 1)) // 64 * 60
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "easy_vqa-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("easy_vqa-1.0.dist-info/LICENSE", "MIT License\n")
        for part, listed in QUESTIONS.items():
            made.writestr(f"easy_vqa/data/{part}/questions.json", json.dumps(listed))
            for image in {image for _, _, image in listed}:
                name = f"easy_vqa/data/{part}/images/{image}.png"
                made.writestr(name, png(10 * (part == "test") + image))
    return path


def test_tables_hold_every_question_once(wheel, tmp_path):
    out = tmp_path / "out"
    main(["--wheel", str(wheel), "--out", str(out), "--val", "1"])
    rows = {s: pq.read_table(out / f"easy-vqa-{s}.parquet").to_pylist() for s in SPLITS}
    assert {split: len(some) for split, some in rows.items()} == {"train": 2, "val": 1, "test": 1}
    by_id = {row["id"]: row for some in rows.values() for row in some}
    first = by_id["train-0"]
    assert (first["shape"], first["color"]) == ("circle", "blue")
    assert [(q["id"], q["kind"]) for q in first["questions"]] == [
        ("train-0-0", "shape"),
        ("train-0-1", "has-shape"),
    ]
    assert (by_id["train-1"]["shape"], by_id["train-1"]["color"]) == ("triangle", "red")
    assert (by_id["train-2"]["shape"], by_id["train-2"]["color"]) == ("circle", None)
    assert (by_id["test-0"]["shape"], by_id["test-0"]["color"]) == (None, "gray")
    summary = json.loads((out / "easy-vqa.json").read_text())
    assert summary["test"]["kinds"]["has-color"] == summary["test"]["questions"] == 1
    again = tmp_path / "again"
    main(["--wheel", str(wheel), "--out", str(again), "--val", "1"])
    for path in out.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_compact_pictures_keep_their_pixels():
    data = png(3)
    smaller = compact_png(data)
    assert len(smaller) < len(data)
    both = [np.asarray(Image.open(io.BytesIO(d)).convert("RGB")) for d in (data, smaller)]
    assert np.array_equal(*both)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format="PNG")  # more colours than a palette holds
    assert compact_png(buffer.getvalue()) == buffer.getvalue()


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("what shape does the image contain?", "circle", "shape"),
        ("what is the color of the shape?", "teal", "color"),
        ("is a triangle present?", "no", "has-shape"),
        ("is there not a gray shape in the image?", "no", "lacks-color"),
        ("is no circle present?", "yes", "lacks-shape"),
    ],
)
def test_kinds(question, answer, kind):
    assert kind_of(question, answer) == kind


def test_what_is_not_such_a_question_is_refused(wheel, tmp_path):
    with pytest.raises(EasyVqaError, match="how many"):
        kind_of("how many shapes are there?", "1")
    with pytest.raises(EasyVqaError, match="contradict"):
        content([("is there a circle?", "yes", "has-shape"), ("what shape?", "triangle", "shape")])
    with pytest.raises(EasyVqaError, match="1 to 2 images, got 3"):
        main(["--wheel", str(wheel), "--out", str(tmp_path / "out"), "--val", "3"])
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as made:
        made.writestr("easy_vqa/data/train/questions.json", json.dumps(QUESTIONS["train"]))
    with pytest.raises(EasyVqaError, match=r"images/0\.png.*easy-vqa 1\.0"):
        main(["--wheel", str(tmp_path / "other.whl"), "--out", str(tmp_path / "out")])
    with zipfile.ZipFile(tmp_path / "bare.whl", "w") as bare, zipfile.ZipFile(wheel) as whole:
        for name in whole.namelist():
            if "LICENSE" not in name:
                bare.writestr(name, whole.read(name))
    with pytest.raises(EasyVqaError, match=r"bare\.whl: no LICENSE"):
        main(["--wheel", str(tmp_path / "bare.whl"), "--out", str(tmp_path / "out")])
