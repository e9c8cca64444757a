import base64
import csv
import io
import json

import pytest
from PIL import Image

from mmtune.data.images import load_image
from mmtune.data.records import DataError
from mmtune.probe.readers import read_mme, read_pope, read_tsv


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


def test_pope(tmp_path):
    lines = [
        {"question_id": 1, "image": "COCO_1.jpg", "text": "Is there a dog?", "label": "yes"},
        {"question_id": 2, "image": "COCO_1.jpg", "text": "Is there a cat?", "label": "no"},
    ]
    file = tmp_path / "coco_pope_adversarial.json"
    file.write_text("\n".join(map(json.dumps, lines)))
    found = read_pope(str(file), "/images")
    assert [(i.id, i.question, i.answer, i.kind) for i in found.items] == [
        ("1", "Is there a dog?", "yes", "yes-no"),
        ("2", "Is there a cat?", "no", "yes-no"),
    ]
    assert found.items[0].subcategory == "POPE adversarial"
    file.write_text("\n".join(map(json.dumps, [*lines, lines[0], lines[0]])))
    with pytest.raises(DataError) as error:
        read_pope(str(file))
    assert [(p.where, p.reason, p.text) for p in error.value.problems] == [
        (f"{file}:{line}", "id twice", "1") for line in (3, 4)
    ]
    file.write_text('{"question_id": 1, "text": "Is there a dog?"}\nnonsense\n')
    with pytest.raises(DataError, match="no answer"):
        read_pope(str(file))


def test_mme(tmp_path):
    for task, name, where in (("color", "001", ""), ("landmark", "a b", "questions_answers_YN")):
        folder = tmp_path / task / where
        folder.mkdir(parents=True)
        text = (
            "Is it red? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"
        )
        (folder / f"{name}.txt").write_text(text)
        images = tmp_path / task / ("images" if where else "")
        images.mkdir(exist_ok=True)
        (images / f"{name}.jpg").write_bytes(png("red"))
    found = read_mme(str(tmp_path))
    assert [(i.category, i.question, i.answer) for i in found.items] == [
        (task, question, answer)
        for task in ("color", "landmark")
        for question, answer in (("Is it red?", "yes"), ("Is it blue?", "no"))
    ]
    pairs = {}
    for item in found.items:
        pairs.setdefault(item.pair_id, []).append(item.id)
        load_image(found.picture(item))
    assert [len(ids) for ids in pairs.values()] == [2, 2]
    (tmp_path / "color/001.jpg").unlink()
    with pytest.raises(DataError, match="missing image"):
        read_mme(str(tmp_path))
    with pytest.raises(DataError, match="no item"):
        read_mme(str(tmp_path / "color"))


def tsv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_tsv(tmp_path):
    red = base64.b64encode(png("red")).decode()
    blue = base64.b64encode(png("blue")).decode()
    row = {"index": "7", "image": red, "question": "Which?", "hint": "nan", "A": "red", "B": "blue",
           "C": "", "answer": "B", "category": "colour", "l2-category": "deep"}  # fmt: skip
    second = {**row, "index": "8", "image": "7", "answer": "A", "hint": "Look."}
    third = {**row, "index": "9", "image": blue}
    found = read_tsv(tsv(tmp_path / "set.tsv", [row, second, third]))
    first, same, other = found.items
    assert (first.answer, first.choices, first.category) == ("blue", ("red", "blue"), "colour")
    assert (same.question, same.answer, same.images) == ("Look.\nWhich?", "red", first.images)
    assert load_image(found.picture(other)).getpixel((0, 0)) == (0, 0, 255)
    assert len(list((tmp_path / "set").glob("*.png"))) == 2
    broken = [row, {**row, "index": "8", "image": "!" * 80}, {**row, "index": "9", "answer": ""}]
    with pytest.raises(DataError, match="bad picture"):
        read_tsv(tsv(tmp_path / "bad.tsv", broken))
