import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from data_builders.looks import colour, contrast
from data_builders.samples import Candidate, Sample
from data_builders.stages.filter import Clip, ClipOptions
from mmtune import zoo
from mmtune.data.transforms import EvalTransform
from tests.data_builders.drawings import context, drawing, named

OFF = {"min_text": None, "min_image": None, "max_image": None}


class Scores:
    """Stands in for a CLIP: name of a text, or colour of a picture's first pixel -> a vector."""

    def __init__(self, pictures, texts):
        self.pictures, self.known = pictures, texts

    def prepared(self, picture):
        return picture.getpixel((0, 0))

    def images(self, pixels):
        return torch.stack([torch.tensor(self.pictures[one]) for one in pixels])

    def texts(self, texts):
        return torch.stack([torch.tensor(self.known[one]) for one in texts])


def unit(cosine):
    return [cosine, (1 - cosine**2) ** 0.5]


def marked(number):
    """A drawing whose first pixel is its own."""
    image = drawing(number)
    image.putpixel((0, 0), (number, 0, 0))
    return image


def stage(tmp_path, images, texts=(("cat", [1.0, 0.0]),), **options):
    """`images`: name -> (picture, its vector)."""
    made = Clip(
        ClipOptions(**OFF | options), context(tmp_path, **{n: p for n, (p, _) in images.items()})
    )
    pictures = {p.getpixel((0, 0)): v for p, v in images.values() if isinstance(p, Image.Image)}
    made.scorer = Scores(pictures, dict(texts))
    return made


def sample(*names, own="own"):
    candidates = tuple(Candidate(named(name), "cat", "test") for name in names)
    return Sample("q", "What?", image=named(own) if own else "", candidates=candidates)


FOUR = {
    "own": (marked(1), unit(0.9)),
    "far": (marked(2), unit(0.1)),
    "near": (marked(3), unit(0.8)),
    "mid": (marked(4), unit(0.5)),
}


def test_the_nearest_to_its_text_comes_first_and_is_chosen(tmp_path):
    (found,) = stage(tmp_path, FOUR).run([sample("far", "near", "mid")])
    assert found.image_rephrase == named("near")
    assert [c.image for c in found.candidates] == [named(n) for n in ("near", "far", "mid")]
    assert [c.scores["clip_text"] for c in found.candidates] == pytest.approx([0.8, 0.1, 0.5])
    between = 0.9 * 0.8 + (1 - 0.81) ** 0.5 * 0.6
    assert found.candidates[0].scores["clip_image"] == pytest.approx(between, abs=1e-4)
    assert {c.reason for c in found.candidates} == {""}


def test_thresholds_and_the_reason_of_each(tmp_path):
    made = stage(tmp_path, FOUR, min_text=0.3, max_image=0.95)
    (found,) = made.run([sample("far", "near", "mid")])
    assert found.image_rephrase == named("mid")
    assert {c.image: c.reason for c in found.candidates} == {
        named("mid"): "",
        named("far"): "unlike its text",
        named("near"): "nearly a copy",
    }
    (none,) = stage(tmp_path, FOUR, min_text=0.85, min_image=0.99).run([sample("far", "near")])
    assert none.reason == "no image passes: unlike its text"
    assert none.text.startswith("2 unlike its text; the nearest to its text, source:near.png")
    assert not none.fault
    (unlike,) = stage(tmp_path, FOUR, min_image=0.995).run([sample("far", "near")])
    assert unlike.reason == "no image passes: unlike the source image"


def test_best_by_image(tmp_path):
    own = FOUR | {"own": (marked(1), unit(0.1))}
    (found,) = stage(tmp_path, own, best_by="image").run([sample("near", "far", "mid")])
    assert found.image_rephrase == named("far")
    (without,) = stage(tmp_path, own, best_by="image").run([sample("near", "far", own="")])
    assert without.image_rephrase == named("near")  # there is no image to be near to


def test_the_source_image_is_not_taken_again(tmp_path):
    first = marked(1)
    larger = first.resize((128, 128))
    larger.putpixel((0, 0), (9, 0, 0))
    images = {"own": (first, unit(0.5)), "copy": (first, unit(0.5)), "larger": (larger, unit(0.5))}
    (found,) = stage(tmp_path, images).run([sample("own", "copy", "larger")])
    assert found.reason == "no image passes: the source image again"
    assert found.text.startswith("3 the source image again")
    (kept,) = stage(tmp_path, images, near=None).run([sample("copy", "larger")])
    assert kept.image_rephrase == named("larger")


def blank(value, noise=0):
    pixels = np.full((32, 32, 3), value, np.int16)
    pixels += np.random.default_rng(0).integers(-noise, noise + 1, pixels.shape, np.int16)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def test_a_generator_of_black_images_ends_in_counts(tmp_path):
    images = {"own": (marked(1), unit(0.5))}
    images |= {f"black{n}": (blank(0), unit(0.5)) for n in range(4)}
    (found,) = stage(tmp_path, images).run([sample(*(f"black{n}" for n in range(4)))])
    assert found.reason == "no image passes: blank image: black"
    assert found.text.startswith("4 blank image: black")
    assert found.fault


@pytest.mark.parametrize(
    ("value", "noise", "name"),
    [(0, 0, "black"), (255, 0, "white"), ((10, 200, 90), 0, "one colour"), (128, 3, "one colour")],
)
def test_blank_images_by_colour(tmp_path, value, noise, name):
    picture = blank(value, noise)
    images = {"own": (marked(1), unit(0.5)), "blank": (picture, unit(0.5))}
    (found,) = stage(tmp_path, images).run([sample("blank")])
    assert found.reason == f"no image passes: blank image: {name}"
    assert colour(np.asarray(picture)) == name


def test_contrast():
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:2] = 100
    assert contrast(pixels) == pytest.approx(50)
    assert contrast(np.full((4, 4, 3), [200, 0, 0], np.uint8)) == 0  # a colour is no contrast
    assert contrast(np.asarray(drawing(0))) > 20


def test_a_flag_turns_a_picture_down_and_is_no_fault(tmp_path):
    images = {"own": (marked(1), unit(0.5)), "flagged": (blank(0), unit(0.9))}
    given = sample("flagged")
    flagged = dataclasses.replace(given.candidates[0], scores={"nsfw": 1.0})
    (found,) = stage(tmp_path, images).run([given.with_(candidates=(flagged,))])
    assert found.reason == "no image passes: flagged as not safe for work"
    assert not found.fault


def test_broken_pictures_are_set_aside(tmp_path):
    images = FOUR | {"broken": (b"\x89PNG", None)}
    made = stage(tmp_path, images)
    kept, none, source, empty = made.run(
        [
            sample("broken", "near"),
            sample("broken", "gone"),
            sample("near", own="broken"),
            sample(),
        ]
    )
    assert kept.image_rephrase == named("near")
    assert kept.candidates[1].reason == "not an image"
    assert kept.candidates[1].scores == {}
    assert none.fault
    assert "1 missing image" in none.text
    assert (source.reason, source.fault) == ("not an image", True)
    assert empty.reason == "no image to choose from"


def test_scores_are_the_models_own(tmp_path):
    pictures = {name: drawing(n) for n, name in enumerate(("own", "one", "two"))}
    options = ClipOptions(model="zoo:tiny-clip", batch_size=2, **OFF)
    made = Clip(options, context(tmp_path, **pictures))
    made.open()
    captions = {"one": "a cat", "two": "a red car"}
    given = sample("one", "two")
    given = given.with_(
        candidates=tuple(
            dataclasses.replace(c, prompt=text)
            for c, text in zip(given.candidates, captions.values(), strict=True)
        )
    )
    (found,) = made.run([given])
    loaded = zoo.load("tiny-clip")
    with torch.no_grad():
        pixels = torch.stack([EvalTransform(loaded.image)(p) for p in pictures.values()])
        own, *others = loaded.backbone.encode_image(loaded.model, pixels)
        texts = loaded.backbone.encode_text(loaded.model, **loaded.tokenize([*captions.values()]))
    by_image = {c.image: c.scores for c in found.candidates}
    for name, image, text in zip(captions, others, texts, strict=True):
        scores = by_image[named(name)]
        assert scores["clip_text"] == pytest.approx(float(image @ text), abs=1e-3)
        assert scores["clip_image"] == pytest.approx(float(image @ own), abs=1e-3)


def test_a_model_that_does_not_score_is_named(tmp_path):
    made = Clip(ClipOptions(model="zoo:tiny-blip@caption"), context(tmp_path))
    with pytest.raises(ValueError, match="tiny-blip@caption does not embed images and texts"):
        made.open()


def test_thresholds_that_nothing_can_pass():
    with pytest.raises(ValueError, match="min_image must not exceed max_image"):
        ClipOptions(min_image=0.9, max_image=0.5)
