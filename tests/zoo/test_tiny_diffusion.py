"""tiny-diffusion: what it is trained on, its losses and scores, and the shipped pipeline."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmtune import zoo
from mmtune.zoo.diffusion import WEIGHTS, load_pipeline, save_diffusion, text_tower
from mmtune.zoo.score_tiny_diffusion import SCORED, table
from mmtune.zoo.tiny_clip.material import held_out_names
from mmtune.zoo.tiny_diffusion.card import card
from mmtune.zoo.tiny_diffusion.material import Drawn, gather, moved, numbered, padded
from mmtune.zoo.tiny_diffusion.model import (
    build_coder,
    build_unet,
    sampling_noise,
    training_noise,
)
from mmtune.zoo.tiny_diffusion.recipe import DiffusionRecipe
from mmtune.zoo.tiny_diffusion.scores import ClipJudge, asked, copies, draw, matches, nearest
from mmtune.zoo.tiny_diffusion.stages import (
    coder_loss,
    draw_batch,
    encode,
    gather_latents,
    psnr,
    train_coder,
    train_unet,
    velocity_loss,
)

FOLDER = zoo.MODEL_ROOT / "tiny-diffusion"
TINY = DiffusionRecipe(
    size=16, coder_width=4, coder_deep=8, width=8, deep=16, coder_batch=6, batch=6, copies=3,
    coder_steps=3, steps=3, warmup=1, variants=2, average=0.5,
)  # fmt: skip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def png(width, height, colour):
    packed = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(packed, "PNG")
    return packed.getvalue()


@pytest.fixture
def few():
    coarse = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=generator())
    pixels = coarse.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    texts = [[f"thing {i}", f"thing {i}, other"] for i in range(5)]
    return Drawn(pixels, torch.tensor([True, False, True, False, True]), texts, 3)


def read(texts):
    return torch.stack([torch.full((4, 6), float(len(text))) for text in texts])


def test_pictures_keep_their_proportions_on_white():
    shown = padded([png(8, 4, "black"), png(3, 9, "black")], 16)
    assert shown.shape == (2, 3, 16, 16)
    dark = (shown < 128).all(dim=1)
    assert [int(side) for side in dark[0].any(dim=1).nonzero()] == list(range(4, 12))
    assert dark[0].any(dim=0).all()
    assert dark[1].any(dim=1).all()
    assert 4 <= int(dark[1].any(dim=0).sum()) <= 6
    assert (shown[0, :, 0] == 255).all()


def test_nothing_held_out_is_trained_on():
    data = gather(dataclasses.replace(TINY, limit=0), None)
    assert data.clipart == len(data.pixels) == len(data.texts) == len(data.mirror) == 3073
    held = {text for name, split in SCORED[:2] for text in asked(name, split).prompts}
    assert len(held) > 900
    assert not held & {some[0] for some in data.texts}
    assert held <= held_out_names()


def test_movement_of_strength_zero_only_resizes(few):
    same = moved(few.pixels, few.mirror, 32, generator(), 0.0)
    torch.testing.assert_close(same, few.pixels.float() / 127.5 - 1, atol=1e-4, rtol=0)


def test_only_what_may_be_mirrored_is(few):
    pixels = torch.full((400, 3, 32, 32), 255, dtype=torch.uint8)
    pixels[:, :, :, :12] = 0  # ink on the left
    mirror = torch.arange(400) % 2 == 0
    shown = moved(pixels, mirror, 32, generator(), 1.0)
    right = shown[..., 16:].mean(dim=(1, 2, 3)) < shown[..., :16].mean(dim=(1, 2, 3))
    assert not right[~mirror].any()
    assert 0.35 < right[mirror].double().mean() < 0.65
    assert (shown[:, :, :1, -1:][~mirror] == 1).all()  # white outside


def test_texts_are_numbered_behind_the_empty_one():
    texts, numbers = numbered([["a", "b"], ["b", "a"], ["c", "c"]])
    assert texts == ["", "a", "b", "c"]
    assert numbers == [[1, 2], [2, 1], [3, 3]]


def test_velocity_loss_is_that_of_the_scheduler():
    """With a network that knows the noise and the picture the loss is 0, else the distance."""
    strengths, latents = training_noise().alphas_cumprod, torch.randn(9, 4, 3, 3)
    texts = torch.zeros(9, 2, 5)
    assert strengths[-1] == 0

    def knows(noisy, step, texts):
        a, s = strengths[step].sqrt()[:, None, None, None], 1 - strengths[step]
        s = s.sqrt()[:, None, None, None]
        noise = (noisy - a * latents) / s
        expected = training_noise().get_velocity(latents, noise, step)
        torch.testing.assert_close(a * noise - s * latents, expected, atol=1e-4, rtol=1e-4)
        return a * noise - s * latents

    assert velocity_loss(knows, latents, texts, strengths, generator()) < 1e-6
    off = velocity_loss(lambda *a: knows(*a) + 0.5, latents, texts, strengths, generator())
    torch.testing.assert_close(off, torch.tensor(0.25), atol=1e-4, rtol=1e-4)


def test_coder_loss_in_closed_form():
    recipe = dataclasses.replace(TINY, weight_edges=2.0, weight_kl=0.5)
    found, pixels = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    loss, parts = coder_loss(recipe, found, pixels, torch.tensor(3.0))
    assert parts["pixel"] == 0.25
    assert parts["edges"] == 1.0  # half of the two differences, down and across
    assert loss == 0.25 + 2.0 + 1.5


def test_batches_hold_each_pictures_own_texts(few):
    coder = build_coder(TINY).eval()
    data = gather_latents(TINY, coder, few, read, generator())
    assert data.drawn.shape == (5, 3, 4, 4, 4)
    assert data.texts.shape == (11, 4, 6)
    owner = {data.drawn[i, c, 0, 0, 0].item(): i for i in range(5) for c in range(3)}
    recipe = dataclasses.replace(TINY, batch=2000, empty=0.25, icon_share=0.5)
    latents, _ = draw_batch(recipe, data, generator())
    data.texts = torch.arange(11.0)[:, None, None].expand(11, 4, 6)
    again, numbers = draw_batch(recipe, data, generator())
    assert torch.equal(latents, again)
    number = numbers[:, 0, 0].long()
    assert 0.2 < (number == 0).double().mean() < 0.3
    drawn = torch.tensor([owner[one[0, 0, 0].item()] for one in latents])
    told = number > 0
    assert torch.equal((number[told] - 1) // 2, drawn[told])
    assert (drawn < 3).sum() == 1000  # the share of drawings


def test_both_stages_lower_their_loss_and_keep_an_average(few):
    recipe = dataclasses.replace(TINY, coder_steps=40, coder_rate=5e-3, steps=30, rate=5e-3)
    plain = torch.zeros(5, dtype=torch.bool)
    shown = moved(few.pixels, plain, 16, generator(), 0.0)
    torch.manual_seed(0)
    before = psnr(build_coder(recipe).eval(), shown).mean()
    coder, steps = train_coder(recipe, few, generator())
    assert steps == 40
    assert psnr(coder, shown).mean() > before + 1
    for parameter in coder.parameters():
        assert torch.equal(parameter, parameter.half().float())
    data = gather_latents(recipe, coder, few, read, generator())
    assert 0.7 < data.drawn.std() < 1.3
    strengths, losses, seen = training_noise().alphas_cumprod, [], []
    for some in (dataclasses.replace(recipe, steps=1, rate=0.0), recipe):
        torch.manual_seed(0)
        unet, _ = train_unet(some, data, generator(), seen.append)

        def predict(noisy, step, texts, unet=unet):
            return unet(noisy, step, encoder_hidden_states=texts).sample

        with torch.no_grad():
            one = data.drawn[:, 0].repeat(20, 1, 1, 1)
            texts = data.texts[data.numbers[:, 0]].repeat(20, 1, 1)
            losses.append(velocity_loss(predict, one, texts, strengths, generator()).item())
    assert len(seen) == 2
    assert losses[1] < losses[0]


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tower, _ = text_tower("tiny-clip")
    torch.manual_seed(0)
    unet, coder = build_unet(TINY, tower.config.hidden_size).eval(), build_coder(TINY).eval()
    save_diffusion(unet, coder, sampling_noise(), "tiny-clip", folder)
    return folder, unet, coder


def test_what_is_stored_is_what_was_trained(small_folder):
    folder, unet, coder = small_folder
    pipeline = load_pipeline(folder)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    for mine, theirs in ((unet, pipeline.unet), (coder, pipeline.vae)):
        assert type(mine) is type(theirs)
        state = theirs.state_dict()
        assert all(torch.equal(v.half().float(), state[n]) for n, v in mine.state_dict().items())
        assert not theirs.training
    pixels = torch.rand(2, 3, 16, 16, generator=generator()) * 2 - 1
    assert encode(pipeline.vae, pixels).shape == (2, 4, 4, 4)


def test_a_picture_depends_on_its_own_seed_and_prompt(small_folder):
    pipeline = load_pipeline(small_folder[0])
    prompts = ["red apple", "castle", "red apple"]
    first = draw(pipeline, prompts, 1, 2, 4.0)
    assert first.shape == (3, 3, 16, 16)
    assert first.dtype == torch.uint8
    assert torch.equal(first, draw(pipeline, prompts, 1, 2, 4.0))
    assert not torch.equal(first[0], first[2])
    assert not torch.equal(first, draw(pipeline, prompts, 2, 2, 4.0))
    two = draw(pipeline, prompts[:2], 1, 2, 4.0)
    assert (two.int() - first[:2].int()).abs().max() <= 1  # alone or among others


def test_text_tower_reads_as_the_clip_does():
    tower, tokenizer = text_tower("tiny-clip")
    loaded = zoo.load("tiny-clip", "hf")
    ids = loaded.tokenize(["red apple", "flag of france"])["input_ids"]
    mine = tokenizer(
        ["red apple", "flag of france"],
        padding="max_length",
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    assert torch.equal(ids, mine)
    with torch.no_grad():
        expected = loaded.model.text_model(input_ids=ids).last_hidden_state
        assert torch.equal(tower(mine)[0], expected)


def test_matches_in_closed_form():
    similarity = torch.tensor([[[0.9, 0.1, 0.2], [0.3, 0.2, 0.4], [0.0, 0.5, 0.6]]])
    found = matches(similarity, [0, 1, 2])
    assert found["own"]["value"] == pytest.approx(100 * 1.7 / 3, abs=1e-3)
    assert found["others"]["value"] == pytest.approx(100 * 1.5 / 6, abs=1e-3)
    assert found["difference"]["value"] == pytest.approx(100 * (1.7 / 3 - 0.25), abs=1e-3)
    assert found["R@1"]["value"] == pytest.approx(200 / 3, abs=1e-3)
    assert found["R@10"]["value"] == 100
    same = matches(similarity, [0, 1, 1])  # the third target is right for the second picture too
    assert same["R@1"]["value"] == 100
    assert same["chance R@1"]["value"] == pytest.approx(500 / 9, abs=1e-3)


def test_nearest_finds_copies_mirrored_or_not():
    known = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8, generator=generator())
    shown = torch.stack([known[4], known[2].flip(1), 255 - known[5]])
    distance, number = nearest(shown, known, torch.device("cpu"))
    assert distance[0] < 1e-3
    assert number[0] == 4
    assert distance[1:].min() > 0.1  # upside down is another picture, and so is a negative
    assert nearest(known[2:3].flip(3), known, torch.device("cpu"))[0] < 1e-3
    far = nearest(torch.zeros_like(known[:1]), torch.full_like(known[:1], 255), torch.device("cpu"))
    assert far[0].item() == pytest.approx(1.0, abs=1e-4)
    assert copies(torch.stack([distance, distance]), 0.05)["value"] == pytest.approx(100 / 3, 1e-3)


@pytest.fixture(scope="module")
def report():
    return json.loads((FOLDER / "metrics.json").read_text())


def test_card_is_that_of_the_scores(report):
    assert (FOLDER / "README.md").read_text() == card(report, table(report["scores"]))
    assert set(report["recipe"]) == {field.name for field in dataclasses.fields(DiffusionRecipe)}


def test_drawn_pictures_fit_their_prompts_by_the_report(report):
    for split, found in report["scores"]["splits"].items():
        for judge in ("clip", "picture"):
            one = found["drawn"][judge]
            assert one["difference"]["low"] > 0, (split, judge)
            assert one["R@1"]["low"] > one["chance R@1"]["high"], (split, judge)
        if split != "clipart-train":
            assert found["drawn"]["nearest"]["median"] > found["real"]["nearest"]["median"]


def test_stored_files_are_small_and_half_precision():
    for part, limit in (("unet", 12), ("vae", 3)):
        file = FOLDER / part / WEIGHTS
        assert file.stat().st_size < limit * 2**20
        assert {t.dtype for t in load_file(file).values()} == {torch.float16}


def test_the_zoo_knows_it_as_a_pipeline():
    assert zoo.names()["pipelines"] == ["tiny-diffusion"]
    assert "tiny-diffusion" not in zoo.names()["models"]
    with pytest.raises(zoo.ZooError, match=r"zoo\.pipeline\('tiny-diffusion'\) loads it"):
        zoo.load("tiny-diffusion")
    with pytest.raises(zoo.ZooError, match="no text-to-image model 'tiny-clip'; it has tiny-diff"):
        zoo.pipeline("tiny-clip")


@pytest.fixture(scope="module")
def pipeline():
    return zoo.pipeline("tiny-diffusion")


def test_shipped_pipeline_draws_what_is_asked(pipeline):
    """Colours by the pixels, things by tiny-clip: six prompts against one another."""
    prompts = ["red apple", "house", "clock", "smiling face", "umbrella", "book"]
    shown = draw(pipeline, prompts, 0, 10, 4.0)
    assert shown.shape == (6, 3, 96, 96)
    red, green, blue = shown[0].float().mean(dim=(1, 2))
    assert red > green + 30
    assert red > blue + 30
    assert shown[:, :, :4].float().mean() > 230  # drawings on white
    judge = ClipJudge(zoo.model_path("tiny-clip"), torch.device("cpu"))
    similarity = judge.images(shown) @ judge.texts(prompts).T
    assert (similarity.argmax(dim=1) == torch.arange(6)).sum() >= 5


def test_saved_whole_it_is_read_by_diffusers_alone(pipeline, tmp_path):
    from diffusers import DiffusionPipeline

    pipeline.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(str(tmp_path), local_files_only=True)
    again.set_progress_bar_config(disable=True)
    first, second = (draw(one, ["castle"], 3, 2, 4.0) for one in (pipeline, again))
    assert np.array_equal(first.numpy(), second.numpy())
