import json

import pytest

from data_builders.samples import Sample
from data_builders.stages.imagine import CONCEPTS, Pairs, PairsOptions
from tests.data_builders.drawings import context, drawing, named


def stage(tmp_path, concepts, pictures, **options):
    made = Pairs(PairsOptions(**options), context(tmp_path, **pictures))
    text = json.dumps({name: [named(one) for one in own] for name, own in concepts.items()})
    (tmp_path / CONCEPTS).write_text(text, encoding="utf-8")
    made.open()
    return made


def cat(number, image):
    return Sample(f"q{number}", "What?", image=named(image), concept="cat")


PICTURES = {f"p{n}": drawing(n) for n in range(8)}
ALL = {"cat": list(PICTURES), "dog": ["p0"]}


def test_other_images_of_the_concept_in_an_order_of_the_samples_own(tmp_path):
    made = stage(tmp_path, ALL, PICTURES, images=3)
    given = [cat(n, "p0") for n in range(20)]
    found = made.run(given)
    for one in found:
        images = [c.image for c in one.candidates]
        assert len(set(images)) == 3
        assert named("p0") not in images
        assert {c.origin for c in one.candidates} == {"pairs"}
        assert {c.prompt for c in one.candidates} == {"cat"}
    assert len({one.candidates[0].image for one in found}) == 7
    assert found[7:9] == made.run(given[7:9])
    other = stage(tmp_path, ALL, PICTURES, images=3, seed=1).run(given)
    assert other != found


def test_never_the_same_picture_again(tmp_path):
    first = drawing(0, 64)
    pictures = {
        "own": first,
        "copy": first,
        "larger": first.resize((128, 128)),
        "other": drawing(1),
        "broken": b"\x89PNG nonsense",
    }
    made = stage(tmp_path, {"cat": [*pictures, "gone", "other"]}, pictures, images=9)
    (found,) = made.run([cat(0, "own")])
    assert [one.image for one in found.candidates] == [named("other")]


def test_what_there_is_none_of(tmp_path):
    first = drawing(0)
    pictures = {"own": first, "copy": first, "broken": b"no"}
    made = stage(tmp_path, {"cat": list(pictures), "dog": ["own"]}, pictures)
    (found,) = made.run([cat(0, "own")])
    assert found.reason == "no other image of the concept"
    assert "1 the same picture" in found.text
    assert "1 not an image" in found.text
    dog = Sample("d", "What?", image=named("own"), concept="dog")
    assert "no image beside its own" in made.run([dog])[0].text
    assert made.run([Sample("x", "What?", image=named("own"))])[0].reason == "no concept"
    (broken,) = made.run([cat(0, "broken")])
    assert broken.fault
    assert broken.reason == "not an image"


def test_without_the_file_of_concepts(tmp_path):
    made = Pairs(PairsOptions(), context(tmp_path))
    with pytest.raises(ValueError, match=r"needs .*concepts\.json"):
        made.open()
