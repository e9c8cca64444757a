"""Sources read the files that people have, and name what is wrong in them."""

from __future__ import annotations

import json

import pytest

from data_builders.samples import Rejected, Sample
from data_builders.sources import sources
from data_builders.sources.coco import Coco, CocoOptions
from data_builders.sources.folder import Folder, FolderOptions
from data_builders.sources.nq import PUBLISHED_PREFIX, NaturalQuestions, NqOptions
from data_builders.sources.okvqa import OkVqa, OkVqaOptions
from data_builders.sources.vqav2 import VQAv2, VQAv2Options
from mmtune.data.records import DataError
from tests.data_builders import coco_files as files
from tests.data_builders.coco_files import outcomes, pictures_of
from tests.editing.edit_items import DATA

REAL = DATA / "mmedit" / "okvqa_loc.json"
TEN = [{"answer_id": i + 1, "answer": a, "answer_confidence": "yes"} for i, a in enumerate(
    ["net"] * 6 + ["netting"] * 3 + [" mesh "]
)]  # fmt: skip


def reasons(found):
    return {r.id: (r.reason, r.fault) for r in found if isinstance(r, Rejected)}


def good(found):
    return [s for s in found if isinstance(s, Sample)]


def test_every_format_names_itself_and_says_which_files_it_reads():
    for name, source in sources().items():
        assert source.name == name
        assert source.options.__doc__


def test_coco_gathers_the_captions_of_an_image(tmp_path):
    options = CocoOptions(files.captions(tmp_path), files.images(tmp_path / "images"))
    dog, man, long = outcomes(Coco(options), tmp_path)
    assert dog.id == "42"
    assert dog.image == f"source:val2014/{files.name_of(42)}"
    assert set(dog.captions) == {
        "A dog on a sofa.", "A brown dog lies on a red sofa.", "Un chien — 犬"
    }  # fmt: skip
    assert dog.answers == dog.captions
    assert dog.question == "a photo of"
    assert dog.concept == ""
    assert (dog.licence, man.licence) == (
        "Attribution License",
        "Attribution-NonCommercial License",
    )
    assert len(long.captions[0].split()) == 500
    assert pictures_of(Coco(options), tmp_path).load(dog.image).size == (8, 6)


def test_coco_concept_is_the_largest_thing_and_categories_choose_images(tmp_path):
    paths = files.captions(tmp_path), files.images(tmp_path / "i"), files.instances(tmp_path)
    found = outcomes(Coco(CocoOptions(*paths)), tmp_path)
    # Two dogs are larger than one couch; of horse and person, as large, the first by name.
    assert [s.concept for s in found] == ["dog", "horse", ""]
    wanted = CocoOptions(*paths, categories=["couch", "person"])
    dog, man, other = outcomes(Coco(wanted), tmp_path)
    assert (dog.concept, man.concept) == ("couch", "person")
    assert (other.reason, other.fault) == ("none of the wanted categories", False)
    with pytest.raises(DataError, match=r"no image shows 'coach'.*Did you mean 'couch'"):
        outcomes(Coco(CocoOptions(*paths, categories=["coach"])), tmp_path)
    with pytest.raises(ValueError, match="categories needs instances"):
        CocoOptions(*paths[:2], categories=["dog"])


def test_coco_names_what_is_broken_and_goes_on(tmp_path):
    every = [{"image_id": 42, "caption": "a dog"}, {"image_id": 7, "caption": "x"}, {"caption": 3}]
    path = files.captions(tmp_path, annotations=[*every, {"image_id": 73, "caption": "  "}])
    found = outcomes(Coco(CocoOptions(path, files.images(tmp_path / "i"))), tmp_path)
    assert [s.id for s in good(found)] == ["42"]
    assert reasons(found) == {
        "annotation 1": ("caption of no image", True),
        "annotation 2": ("malformed record", True),
        "73": ("record without caption", True),
        "74": ("record without caption", True),
    }
    assert all(path in r.text for r in found if isinstance(r, Rejected))


def vqa_files(folder):
    asked = [
        {"image_id": 42, "question": "What is that?\n", "question_id": 42000},
        {"image_id": 42, "question": "Again?", "question_id": 42000},
        {"image_id": 73, "question": "  ", "question_id": 73000},
        {"image_id": 73, "question": "Who?", "question_id": 73001},
        {"image_id": 99, "question": "Where?", "question_id": 99000},
        "not a mapping",
    ]
    told = [
        {"question_id": 42000, "image_id": 42, "question_type": "what is", "answers": TEN},
        {"question_id": 99000, "image_id": 99, "answer_type": "other", "answers": TEN},
    ]
    return files.questions(folder, asked), files.answers(folder, told)


def test_vqav2_joins_questions_answers_captions_and_instances(tmp_path):
    options = VQAv2Options(
        *vqa_files(tmp_path),
        images=files.images(tmp_path / "images"),
        captions=files.captions(tmp_path),
        instances=files.instances(tmp_path),
        licence="CC BY 4.0",
    )
    found = outcomes(VQAv2(options, "image"), tmp_path)
    (sample,) = good(found)
    assert sample.question == "What is that?"
    assert sample.image == f"image:val2014/{files.name_of(42)}"
    assert sample.answers == ("net",) * 6 + ("netting",) * 3 + ("mesh",)
    assert len(sample.captions) == 3
    assert sample.concept == "dog"
    assert sample.fields == {"question_id": "42000", "image_id": 42, "kind": "what is"}
    assert reasons(found) == {
        "42000 (again, number 1)": ("duplicate id", True),
        "record 2": ("malformed record", True),
        "record 3": ("question without answers", True),
        "99000": ("missing image", True),
        "record 5": ("malformed record", True),
    }
    assert Sample.of_json(json.loads(json.dumps(sample.as_json()))) == sample


def test_an_image_may_not_lead_out_of_its_folder(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"x")
    inside = tmp_path / "set"
    inside.mkdir()
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    line = {"question": "q", "answer": "a"}
    names = ["../secret.png", "link.png", str(tmp_path / "secret.png"), "ok.png"]
    (inside / "ok.png").write_bytes(b"no image, which is found where it is loaded")
    text = "\n".join(json.dumps(line | {"file_name": name}) for name in names)
    (inside / "metadata.jsonl").write_text(text)
    found = outcomes(Folder(FolderOptions(str(inside))), tmp_path)
    assert [o.reason for o in found[:3]] == ["image outside root"] * 3
    assert found[3].image == "source:ok.png"


def ok_vqa_files(folder):
    asked = [{"image_id": 42, "question": "What sport?", "question_id": i} for i in range(4)]
    pairs = [("racing", "race"), ("racing", "race"), ("ride it", "ride")]
    given = [{"answer_id": i, "raw_answer": r, "answer": a} for i, (r, a) in enumerate(pairs)]
    told = [
        {"question_id": 0, "image_id": 42, "question_type": "four", "answers": given},
        {"question_id": 1, "image_id": 42, "answers": [{"raw_answer": " "}]},
        {"question_id": 2, "image_id": 42, "answers": "racing"},
    ]
    return (
        files.questions(folder, asked, "OpenEnded_mscoco_val2014_questions.json"),
        files.answers(folder, told, "mscoco_val2014_annotations.json"),
    )


def test_okvqa_takes_the_raw_answers_or_the_stemmed_ones(tmp_path):
    paths, images = ok_vqa_files(tmp_path), files.images(tmp_path / "images")
    found = outcomes(OkVqa(OkVqaOptions(*paths, images)), tmp_path)
    (sample,) = good(found)
    assert sample.answers == ("racing", "racing", "ride it")
    assert sample.fields["kind"] == "four"
    assert reasons(found) == {
        "1": ("question without answers", True),
        "2": ("malformed record", True),
        "3": ("question without answers", True),
    }
    stemmed = outcomes(OkVqa(OkVqaOptions(*paths, images, words="stemmed")), tmp_path)
    assert good(stemmed)[0].answers == ("race", "race", "ride")
    with pytest.raises(DataError, match="set `answers` to"):
        outcomes(OkVqa(OkVqaOptions(paths[0], images=images)), tmp_path)


def test_okvqa_reads_the_list_of_easyedit(tmp_path):
    image = f"val2014/{files.name_of(42)}"
    items = [
        {"question_id": 1, "question": "What?", "answer": ["net"] * 10, "image": image},
        {"question_id": 2, "question": "", "answer": ["net"], "image": image},
        {"question_id": 3, "question": "What?", "answer": [], "image": image},
        {"question_id": 4, "question": "What?", "answer": ["a"], "image": None},
        {"question_id": 5, "question": "What?", "answer": ["a"], "image": "val2014/none.jpg"},
        7,
    ]
    path = files.write(tmp_path / "okvqa_loc.json", items)
    found = outcomes(OkVqa(OkVqaOptions(path, images=files.images(tmp_path / "i"))), tmp_path)
    assert good(found)[0].answers == ("net",) * 10
    assert [reasons(found)[k][0] for k in ("2", "3", "4", "5", "record 5")] == [
        "empty field",
        "question without answers",
        "malformed record",
        "missing image",
        "malformed record",
    ]


@pytest.mark.skipif(not REAL.is_file(), reason="the published pool is not here")
def test_the_published_pool_is_read_whole(tmp_path):
    items = json.loads(REAL.read_text())
    (tmp_path / "val2014").mkdir()
    for item in items[1:]:
        (tmp_path / item["image"]).touch()
    source = OkVqa(OkVqaOptions(str(REAL), images=str(tmp_path)), "image")
    found = outcomes(source, tmp_path)
    assert len(found) == len(items) == 5046
    shown = sum(item["image"] != items[0]["image"] for item in items)
    assert len(good(found)) == shown
    assert reasons(found)[str(items[0]["question_id"])] == ("missing image", True)
    given = {str(i["question_id"]): [a for a in i["answer"] if a.strip()] for i in items}
    assert min(map(len, given.values())) < 10  # some annotators wrote nothing
    assert all(len(sample.answers) == len(given[sample.id]) for sample in good(found))


def test_nq_reads_the_files_of_mend_and_lines(tmp_path):
    questions = ["Who got the first nobel prize in physics?", "Löwe or 獅子?", "x", ""]
    answers = ["Wilhelm Conrad Röntgen", ["lion", " "], [], "y"]
    mend = files.write(tmp_path / "train.json", {"questions": questions, "answers": answers})
    found = outcomes(NaturalQuestions(NqOptions(mend)), tmp_path)
    assert [(s.id, s.question, s.answers) for s in good(found)] == [
        ("0", questions[0], ("Wilhelm Conrad Röntgen",)),
        ("1", questions[1], ("lion",)),
    ]
    assert good(found)[0].image == ""
    assert [r.reason for r in found[2:]] == ["question without answers", "empty field"]
    lines = [{"question": q, "answer": a} for q, a in zip(questions[:2], answers, strict=False)]
    lines[1]["question"] = PUBLISHED_PREFIX + questions[1]
    path = tmp_path / "NQ-open.dev.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\nnot json\n[]\n")
    found = outcomes(NaturalQuestions(NqOptions(str(path), PUBLISHED_PREFIX)), tmp_path)
    assert [s.question for s in good(found)] == [PUBLISHED_PREFIX + q for q in questions[:2]]
    assert [r.reason for r in found[2:]] == ["not JSON", "malformed record"]
    assert "line 3" in found[2].text
    one = files.write(tmp_path / "list.json", [{"id": "a", "question": "Q?", "answers": ["A"]}])
    assert good(outcomes(NaturalQuestions(NqOptions(one)), tmp_path))[0].id == "a"


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"questions": ["a"], "answers": []}, "1 questions and 0 answers"),
        ({"data": []}, "expected a mapping with lists"),
        ([], "no sample: it is empty"),
        ([{"question": 1}, {"question": 2}], "2 malformed record"),
    ],
)
def test_a_file_without_a_sample_is_an_error(tmp_path, document, text):
    path = files.write(tmp_path / "nq.json", document)
    with pytest.raises(DataError, match=text):
        outcomes(NaturalQuestions(NqOptions(path)), tmp_path)


@pytest.mark.parametrize("document", [{"images": []}, [], {"annotations": [], "images": 3}])
def test_a_file_of_another_shape_is_an_error(tmp_path, document):
    path = files.write(tmp_path / "captions.json", document)
    with pytest.raises(DataError, match="not the format it says"):
        outcomes(Coco(CocoOptions(path)), tmp_path)
    with pytest.raises(DataError, match="missing file"):
        outcomes(Coco(CocoOptions(str(tmp_path / "none.json"))), tmp_path)


def test_a_folder_holds_questions_captions_or_both(tmp_path):
    files.images(tmp_path)
    name = f"val2014/{files.name_of(42)}"
    lines = [
        {"file_name": name, "question": "What?", "answers": ["a", "a", "b"], "concept": "dog",
         "license": "CC0", "rephrase": "Which?", "kind": "name", "caption": "a dog"},
        {"file_name": name, "captions": ["a dog", "  ", "one dog"], "id": "c", "split": "eval"},
        {"question": "Capital of France?", "answer": "Paris"},
        {"file_name": name},
        {"file_name": name, "question": "What?"},
        {"file_name": 3, "question": "What?", "answer": "a"},
        {"file_name": name, "question": "What?", "answer": {"a": 1}},
        5,
    ]  # fmt: skip
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8")
    found = outcomes(Folder(FolderOptions(str(tmp_path), licence="mine")), tmp_path)
    first, second, third = good(found)
    assert first.answers == ("a", "a", "b")
    assert first.fields == {"rephrase": "Which?", "kind": "name"}
    assert (first.concept, first.licence, first.captions) == ("dog", "CC0", ("a dog",))
    assert (second.question, second.answers) == ("a photo of", ("a dog", "one dog"))
    assert (second.id, second.split, second.licence) == ("c", "eval", "mine")
    assert (third.image, third.answers) == ("", ("Paris",))
    assert [r.reason for r in found[3:]] == [
        "neither question nor caption",
        "question without answers",
        "malformed record",
        "malformed record",
        "malformed record",
    ]
    assert all(r.fault and "line" in r.text for r in found[3:])
