import errno
import logging
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_builders.pictures import MADE, Pictures
from data_builders.samples import Sample
from data_builders.stages.base import Context
from data_builders.stages.imagine import Diffusers, DiffusersOptions, file_name
from data_builders.text_to_image import Drawn, TextToImage, shortened
from editing.config import EditModelOptions
from mmtune import zoo

TINY = ("random:tiny-sd", "random:tiny-sdxl", "random:tiny-sd3")
SMALL = {"num_inference_steps": 2, "width": 32, "height": 32}


def context(tmp_path, seed=0, device="cpu"):
    pictures = Pictures({MADE: tmp_path / "made"})
    return Context(seed, EditModelOptions("zoo:tiny-llava"), pictures, tmp_path, device)


def options(pipeline=TINY[0], **given):
    small = {"dtype": "float32", "steps": 2, "width": 32, "height": 32, "images": 2}
    return DiffusersOptions(**({"pipeline": pipeline, "batch_size": 3} | small | given))


def stage(tmp_path, seed=0, **given):
    made = Diffusers(options(**given), context(tmp_path, seed))
    made.open()
    return made


class Draws:
    """Stands in for a pipeline: a picture whose colour says which batch it was of."""

    limit = 10**6

    def __init__(self, nsfw=None):
        self.calls, self.nsfw = [], nsfw

    def tokens(self, text):
        return len(text.split())

    def draw(self, prompts, seeds, **settings):
        self.calls.append((list(prompts), list(seeds), settings))
        pixels = np.full((8, 8, 3), len(self.calls), np.uint8)
        return [Drawn(pixels, self.nsfw) for _ in prompts]


def fake(tmp_path, nsfw=None, **given):
    made = Diffusers(options(**given), context(tmp_path))
    made.drawer = Draws(nsfw)
    return made


def samples(*captions):
    return [Sample(f"q{n}", "What?", captions=own) for n, own in enumerate(captions)]


@pytest.fixture(scope="module", params=TINY)
def drawer(request):
    return TextToImage(request.param)


def test_stock_pipelines_draw_what_the_prompt_and_the_seed_say(drawer):
    cat, dog, other, same = (
        one.pixels.astype(int)
        for one in drawer.draw(
            ["a cat", "a dog", "a cat", "a cat"], [1, 1, 2, 1], guidance_scale=5.0, **SMALL
        )
    )
    assert cat.shape == (32, 32, 3)
    assert abs(cat - same).max() <= 1  # rows of a matrix product may differ in their last bits
    assert abs(cat - dog).max() > 2
    assert abs(cat - other).max() > 20


def test_a_picture_depends_on_nothing_else_in_its_batch(drawer):
    """Turbo's scheduler draws noise in every step as well."""
    together = drawer.draw(["a cat", "a dog", "a bus"], [1, 2, 3], guidance_scale=5.0, **SMALL)
    alone = drawer.draw(["a dog"], [2], guidance_scale=5.0, **SMALL)[0]
    assert abs(together[1].pixels.astype(int) - alone.pixels).max() <= 1


def test_a_distilled_pipeline_in_one_step_without_guidance(drawer):
    (found,) = drawer.draw(
        ["a cat"], [1], **SMALL | {"num_inference_steps": 1, "guidance_scale": 0.0}
    )
    assert found.pixels.shape == (32, 32, 3)
    assert found.nsfw is None


def test_it_is_what_the_pipeline_itself_draws(drawer):
    (found,) = drawer.draw(["a cat"], [5], guidance_scale=5.0, negative_prompt="ugly", **SMALL)
    image = drawer.pipeline(
        "a cat", negative_prompt="ugly", guidance_scale=5.0,
        generator=torch.Generator().manual_seed(5), **SMALL,
    ).images[0]  # fmt: skip
    np.testing.assert_array_equal(found.pixels, np.asarray(image))
    plain = drawer.draw(["a cat"], [5], guidance_scale=5.0, **SMALL)[0]
    assert (plain.pixels != found.pixels).any()


def test_long_captions_are_cut_at_a_word_to_what_is_read(drawer):
    words = " ".join(f"dog{n}" for n in range(500))
    prompt, cut = shortened("{caption}, a photo", words, drawer)
    assert cut
    assert prompt.endswith(", a photo")
    assert drawer.tokens(prompt) <= drawer.limit == 32
    kept = len(prompt.split()) - 2
    assert words.startswith(prompt.removesuffix(", a photo"))
    more = " ".join(words.split()[: kept + 1]) + ", a photo"
    assert drawer.tokens(more) > drawer.limit
    assert shortened("{caption}, a photo", "a dog", drawer) == ("a dog, a photo", False)


def test_it_loads_what_a_pipeline_saved(tmp_path, drawer):
    drawer.pipeline.save_pretrained(tmp_path, safe_serialization=True)
    again = TextToImage(f"hf:{tmp_path}")
    for name, part in drawer.pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            torch.testing.assert_close(
                again.pipeline.components[name].state_dict(), part.state_dict(), rtol=0, atol=0
            )
    first, second = (d.draw(["a cat"], [3], **SMALL)[0].pixels for d in (drawer, again))
    # Weights that are mapped from a file lie elsewhere, which moves sums in their last bits.
    assert abs(first.astype(int) - second).max() <= 1


def test_pipelines_of_the_zoo(monkeypatch):
    made = TextToImage(TINY[0]).pipeline
    monkeypatch.setattr(zoo, "pipeline", {"drawer": made}.get)
    found = TextToImage("zoo:drawer", "bfloat16")
    assert found.pipeline is made
    assert found.pipeline.unet.dtype == torch.bfloat16
    assert found.draw(["a cat"], [1], **SMALL)[0].pixels.shape == (32, 32, 3)


def test_schedulers_by_name():
    plain = TextToImage(TINY[0])
    other = TextToImage(
        TINY[0],
        scheduler="EulerDiscreteScheduler",
        scheduler_options={"timestep_spacing": "trailing"},
    )
    assert type(other.pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    assert other.pipeline.scheduler.config.timestep_spacing == "trailing"
    assert other.pipeline.scheduler.config.beta_end == plain.pipeline.scheduler.config.beta_end
    first, second = (d.draw(["a cat"], [3], **SMALL)[0].pixels for d in (plain, other))
    assert (first != second).any()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"name": "random:sd9"}, "no random pipeline 'random:sd9'|'sd9'; there are sd21"),
        ({"name": "sd21"}, "no text-to-image pipeline 'sd21'; expected hf:"),
        ({"name": "zoo:no-such"}, "the zoo has no text-to-image model 'no-such'"),
        ({"name": "hf:./no/folder"}, "there is no folder"),
        ({"name": TINY[0], "scheduler": "EulerDiscretScheduler"}, "Did you mean 'EulerDiscreteS"),
        ({"name": TINY[0], "scheduler": "FlowMatchEulerDiscreteScheduler"}, "goes not with Stable"),
        ({"name": TINY[2], "scheduler": "DDIMScheduler"}, "goes not with StableDiffusion3"),
        ({"name": TINY[0], "scheduler_options": {"spacing": 1}}, "takes no spacing; it takes num_"),
    ],
)
def test_what_cannot_be_loaded_is_named(given, match):
    with pytest.raises(ValueError, match=match):
        TextToImage(**given)


def test_a_folder_without_a_pipeline(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be loaded as a pipeline.*Expected hf:"):
        TextToImage(f"hf:{tmp_path}")


def test_a_setting_that_a_pipeline_does_not_take(drawer):
    with pytest.raises(ValueError, match="takes no frames; leave it out"):
        drawer.draw(["a cat"], [0], frames=3)


def test_pictures_are_saved_with_what_made_them(tmp_path):
    made = stage(tmp_path, captions=2)
    (found,) = made.run(samples(("a cat", "a dog", "never drawn")))
    assert [one.prompt for one in found.candidates] == ["a cat", "a cat", "a dog", "a dog"]
    assert [one.image for one in found.candidates] == [f"made:imagine/q0-{k}.png" for k in range(4)]
    assert len({one.seed for one in found.candidates}) == 4
    assert {one.origin for one in found.candidates} == {TINY[0]}
    drawer = TextToImage(TINY[0])
    for one in found.candidates:
        (again,) = drawer.draw([one.prompt], [one.seed], guidance_scale=7.5, **SMALL)
        pixels = np.asarray(made.context.pictures.load(one.image)).astype(int)
        assert abs(pixels - again.pixels).max() <= 1


def test_a_sample_has_its_pictures_whoever_its_neighbours_are(tmp_path):
    given = samples(("a cat",), ("a dog",), ("a bus",))
    whole = stage(tmp_path / "a").run(given)
    part = stage(tmp_path / "b").run(given[1:])
    assert whole[1:] == part
    other = stage(tmp_path / "c", seed=1).run(given)
    assert {c.seed for s in whole for c in s.candidates}.isdisjoint(
        c.seed for s in other for c in s.candidates
    )


def test_batches_and_settings(tmp_path):
    made = fake(tmp_path, images=2, batch_size=3, negative_prompt="text", guidance=0.0)
    found = made.run(samples(("a cat",), ("a dog",)))
    prompts = [call[0] for call in made.drawer.calls]
    assert prompts == [["a cat", "a cat", "a dog"], ["a dog"]]
    assert made.drawer.calls[0][2] == {
        "num_inference_steps": 2, "guidance_scale": 0.0, "width": 32, "height": 32,
        "negative_prompt": "text",
    }  # fmt: skip
    colours = [
        made.context.pictures.load(c.image).getpixel((0, 0)) for s in found for c in s.candidates
    ]
    assert colours == [(1, 1, 1), (1, 1, 1), (1, 1, 1), (2, 2, 2)]


def test_a_safety_checkers_flag_is_kept(tmp_path):
    for flag, expected in ((True, {"nsfw": 1.0}), (False, {"nsfw": 0.0}), (None, {})):
        (found,) = fake(tmp_path, flag).run(samples(("a cat",)))
        assert found.candidates[0].scores == expected


def test_cut_captions_are_counted(tmp_path, caplog):
    made = fake(tmp_path)
    made.drawer.limit = 20
    with caplog.at_level(logging.WARNING):
        long, short = made.run(samples((" ".join(["word"] * 500),), ("a dog",)))
    assert long.fields == {"captions_cut": 1}
    assert len(long.candidates[0].prompt.split()) == 20
    assert short.fields == {}
    assert "1 captions are longer than the 20 tokens that random:tiny-sd reads" in caplog.text


def test_templates_of_prompts(tmp_path):
    made = fake(tmp_path, template="a drawing of a {concept}", images=1)
    found = made.run([Sample("a", "What?", concept="cat"), Sample("b", "What?")])
    assert found[0].candidates[0].prompt == "a drawing of a cat"
    assert found[1].reason == "nothing to draw"
    (blank,) = fake(tmp_path).run(samples(("  ",)))
    assert blank.reason == "nothing to draw"
    assert not blank.fault
    for bad in ("", "a cat", "{caption} {x}", "{caption"):
        with pytest.raises(ValueError, match="template must hold"):
            options(template=bad)


def test_a_full_disk_ends_it_at_once_and_leaves_no_half_picture(tmp_path, monkeypatch):
    made = fake(tmp_path, images=50, batch_size=1)
    save, count = Pictures.save, []

    def full(self, name, picture):
        count.append(name)
        if len(count) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, name, picture)

    draw = made.drawer.draw
    written = threading.Event()

    def slowly(*args, **settings):
        written.wait(0.02)  # as long as a picture takes to be written
        return draw(*args, **settings)

    made.drawer.draw = slowly
    monkeypatch.setattr(Pictures, "save", full)
    with pytest.raises(OSError, match="No space left"):
        made.run(samples(("a cat",)))
    assert len(made.drawer.calls) < 50
    assert not list(tmp_path.rglob("*.partial"))


NAMES = st.text(st.sampled_from("aAbB.-_~/ é\x00#0"), min_size=1, max_size=8)


@given(st.lists(NAMES, unique=True, max_size=30))
def test_files_of_different_samples_have_different_names(names):
    files = [f"{file_name(name)}-{k}.png" for name in names for k in range(12)]
    assert len({file.casefold() for file in files}) == len(files)
    for file in files:
        assert not file.startswith(".")
        assert set(file) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-~")


def test_plain_names_stay_and_long_ones_fit():
    assert file_name("val2014-17.b_c") == "val2014-17.b_c"
    assert len(file_name("x" * 5000)) < 100
    assert file_name("x" * 61) != file_name("x" * 62)
