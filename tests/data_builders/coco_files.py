"""Small files in the layouts of COCO, VQAv2 and OK-VQA, with their images."""

from __future__ import annotations

import json

from PIL import Image

from data_builders.pictures import MADE, Pictures

NUMBERS = (42, 73, 74)
CAPTIONS = {
    42: ["A dog on a sofa.", "A brown dog lies\non a red sofa. ", "", "Un chien — 犬"],
    73: ["A man rides a horse.", "Person on horse"],
    74: [" ".join(["word"] * 500)],
}


def name_of(number):
    return f"COCO_val2014_{number:012d}.jpg"


def write(path, document):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")
    return str(path)


def images(folder, numbers=NUMBERS):
    """The images in a folder of their split, as the archives unpack."""
    (folder / "val2014").mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.new("RGB", (8, 6), (number, 9, 9)).save(folder / "val2014" / name_of(number))
    return str(folder)


def captions(folder, **changes):
    every = [(n, text) for n in NUMBERS for text in CAPTIONS[n]]
    every.sort(key=lambda pair: (len(pair[1]), pair[0]))  # not grouped, as in the real file
    document = {
        "info": {"year": 2014},
        "images": [
            {"license": 1 + n % 2, "file_name": name_of(n), "id": n, "height": 6, "width": 8}
            for n in NUMBERS
        ],
        "licenses": [
            {"id": 1, "name": "Attribution License", "url": "http://x/by/2.0/"},
            {"id": 2, "name": "Attribution-NonCommercial License", "url": "http://x/nc/2.0/"},
        ],
        "annotations": [
            {"image_id": n, "id": 10 + i, "caption": text} for i, (n, text) in enumerate(every)
        ],
    }
    return write(folder / "captions_val2014.json", document | changes)


def instances(folder):
    document = {
        "images": [{"file_name": name_of(n), "id": n} for n in NUMBERS],
        "categories": [
            {"supercategory": "animal", "id": 18, "name": "dog"},
            {"supercategory": "animal", "id": 19, "name": "horse"},
            {"supercategory": "furniture", "id": 63, "name": "couch"},
            {"supercategory": "person", "id": 1, "name": "person"},
        ],
        "annotations": [
            {"image_id": 42, "category_id": 63, "area": 90.5, "iscrowd": 0, "bbox": [0, 0, 9, 9]},
            {"image_id": 42, "category_id": 18, "area": 60.0, "iscrowd": 0, "bbox": [0, 0, 9, 9]},
            {"image_id": 42, "category_id": 18, "area": 50.0, "iscrowd": 0, "bbox": [0, 0, 9, 9]},
            {"image_id": 73, "category_id": 19, "area": 10.0, "iscrowd": 0, "bbox": [0, 0, 9, 9]},
            {"image_id": 73, "category_id": 1, "area": 10.0, "iscrowd": 0, "bbox": [0, 0, 9, 9]},
        ],
    }
    return write(folder / "instances_val2014.json", document)


def questions(folder, every, name="v2_OpenEnded_mscoco_val2014_questions.json"):
    document = {
        "info": {},
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "data_subtype": "val2014",
        "license": {},
        "questions": every,
    }
    return write(folder / name, document)


def answers(folder, every, name="v2_mscoco_val2014_annotations.json"):
    document = {"data_subtype": "val2014", "annotations": every}
    return write(folder / name, document)


def pictures_of(source, folder):
    return Pictures({**source.roots(), MADE: folder / "made"})


def outcomes(source, folder):
    return list(source.read(pictures_of(source, folder)))
