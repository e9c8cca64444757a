"""Prompt tuning: what enters, what it changes, and several prompts in one batch."""

import copy
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model

from mmtune import lora_config
from mmtune.backbones import SiteError, backbone_of
from mmtune.conformance.backbones import BACKBONES, VOCABULARY, build, images_and_texts
from mmtune.tuners.prompt import PromptConfig, ensemble_embeddings, ensembled, majority_vote
from tests.backbones.mllm_checks import cached, greedy
from tests.tuners.by_hand import BOTH, images, made, patches, pooled, spliced, texts, words

TOWERS = pytest.mark.parametrize("name", BOTH)


def prompted(model, name="default", **settings):
    backbone_of(model).prepare()
    wrapped = get_peft_model(model, PromptConfig(**settings), adapter_name=name).eval()
    return wrapped, backbone_of(wrapped)


def tokens_of(model, branch, name="default"):
    return model.get_submodule(f"prompt_{branch}").mmtune_tokens[name].detach()


@TOWERS
def test_text_is_what_a_forward_by_hand_computes(name):
    """Full captions, short ones with padding; prompts behind the begin token, words in place."""
    model, lengths = made(name), [77, 40, 9, 3]
    wrapped, view = prompted(model, tokens=16, init="uniform", seed=1)
    ids, prompt = texts(lengths), tokens_of(model, "text").double()
    pairs = list(zip(ids, lengths, strict=True))
    with torch.no_grad():
        found = view.encode_text(wrapped, ids)
        wide = [(spliced(words(model, row), prompt, [1] * 16), n) for row, n in pairs]
        want = [pooled(view, "text", sequence, n + 15) for sequence, n in wide]
        base = [pooled(view, "text", words(model, row), n - 1) for row, n in pairs]
    assert torch.allclose(found, torch.stack(want), atol=1e-12, rtol=0)
    assert (found - torch.stack(base)).abs().max() > 1e-3


@TOWERS
def test_images_are_what_a_forward_by_hand_computes(name):
    model = made(name)
    wrapped, view = prompted(model, tokens=5, seed=1)
    prompt, batch = tokens_of(model, "vision").double(), images(2)
    with torch.no_grad():
        found = view.encode_image(wrapped, batch)
        wide = [spliced(patches(model, image), prompt, [1] * 5) for image in batch]
        want = [pooled(view, "vision", w, 0) for w in wide]
    assert torch.allclose(found, torch.stack(want), atol=1e-12, rtol=0)


def test_padding_masks_hide_no_prompt():
    """A padded batch with its mask gives what each text gives alone, unpadded."""
    model, lengths = made("clip"), [12, 5]
    wrapped, view = prompted(model, tokens=4, branches=["text"], seed=1)
    ids = texts(lengths)
    mask = (torch.arange(77) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        found = view.encode_text(wrapped, ids, mask)
        for row, n, got in zip(ids, lengths, found, strict=True):
            alone = view.encode_text(wrapped, row[None, :n])[0]
            assert torch.allclose(got, alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["clip", "open_clip", "siglip"])
def test_init_text_is_what_the_text_would_be(name):
    """The vectors that the trunk receives for these words at the same place."""
    ids = [7, 8, 9, 10]
    model = build(name)
    wrapped, view = prompted(model, tokens=4, init="text", init_ids=ids, branches=["text"])
    trunk = view.trunks()["text"]
    sentence = torch.tensor([[1] * trunk.start + ids + [VOCABULARY - 1]])
    caught = []
    trunk.module.register_forward_pre_hook(
        lambda _, args, kwargs: caught.append(args[0] if args else kwargs[trunk.hidden]),
        with_kwargs=True,
        prepend=True,
    )
    if name == "open_clip":
        sentence = torch.nn.functional.pad(sentence, (0, 10 - sentence.shape[1]))
    with torch.no_grad(), wrapped.disable_adapter():
        view.encode_text(wrapped, sentence)
    assert torch.allclose(
        tokens_of(model, "text"), caught[0][0, trunk.start : trunk.start + 4], atol=1e-6
    )


def test_init_text_is_repeated_or_cut():
    long, short = (
        tokens_of(prompted(build("siglip"), tokens=n, init="text", init_ids=ids)[0], "text")
        for n, ids in ((5, [7, 8]), (5, [7, 8, 7, 8, 7, 8, 7]))
    )
    assert torch.equal(long, short)


def test_init_vocabulary_takes_rows_and_vision_is_uniform():
    model = build("clip")
    prompted(model, tokens=6, seed=3)
    places = model.text_model.embeddings.position_embedding.weight[1:7]
    rows = tokens_of(model, "text") - places
    vocabulary = model.text_model.embeddings.token_embedding.weight
    distance = (rows[:, None] - vocabulary).abs().amax(-1)  # [6, v]
    assert distance.amin(-1).max() < 1e-6
    vision = tokens_of(model, "vision")
    assert vision.abs().max() <= 0.5
    assert abs(vision.var().item() - 1 / 12) < 0.01
    again = build("clip")
    prompted(again, tokens=6, seed=3)
    assert torch.equal(tokens_of(again, "text"), tokens_of(model, "text"))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tokens": 0}, ValueError, "at least 1, got 0"),
        ({"layers": "last:2"}, ValueError, "pass through all of its layers"),
        ({"init": "random"}, ValueError, "vocabulary, text or uniform, got 'random'"),
        ({"init": "text"}, ValueError, "needs prompt.init_ids"),
        ({"init_ids": [1]}, ValueError, "set init: text"),
        ({"tokens": 8}, ValueError, "prompt.tokens is 8, but text was trained on texts of 10"),
        ({"tokens": 2, "branches": ["fusion"]}, SiteError, "one: vision, text"),
        (
            {"tokens": 2, "init": "text", "init_ids": [3, 60]},
            ValueError,
            r"must be in 0\.\.59, the vocabulary of text, got 60",
        ),
    ],
)
def test_wrong_settings_are_told_before_anything_is_changed(settings, error, message):
    model = build("clip")
    before = [n for n, _ in model.named_modules()]
    with pytest.raises(error, match=message):
        get_peft_model(model, PromptConfig(**settings))
    assert [n for n, _ in model.named_modules()] == before
    assert not model.text_model.encoder._forward_pre_hooks


def test_the_longest_prompt_fits():
    model = build("clip")
    wrapped, view = prompted(model, tokens=7)
    with torch.no_grad():
        assert view.encode_text(wrapped, images_and_texts(0, 2)["input_ids"]).isfinite().all()


def test_several_active_prompts_stand_one_behind_the_other():
    model, ids = build("clip").double(), images_and_texts(0, 3)["input_ids"]
    wrapped, view = prompted(model, "a", tokens=2, branches=["text"], seed=1)
    wrapped.add_adapter("b", PromptConfig(tokens=3, branches=["text"], seed=2))
    wrapped.base_model.set_adapter(["a", "b"])
    other = build("clip").double()
    whole, other_view = prompted(other, tokens=5, branches=["text"])
    joined = torch.cat([tokens_of(model, "text", n) for n in "ab"])
    other.get_submodule("prompt_text").mmtune_tokens["default"].data = joined
    with torch.no_grad():
        found, want = view.encode_text(wrapped, ids), other_view.encode_text(whole, ids)
    assert torch.equal(found, want)


def test_a_deep_copy_has_tokens_of_its_own():
    model, batch = build("open_clip-timm"), images_and_texts(0, 2)
    wrapped, view = prompted(model, tokens=3, seed=1)
    twin = copy.deepcopy(wrapped)
    with torch.no_grad():
        before = view.embed_pairs(wrapped, batch)
        for p in twin.parameters():
            if p.requires_grad:
                p.normal_()
        after, moved = view.embed_pairs(wrapped, batch), backbone_of(twin).embed_pairs(twin, batch)
    for a, b, c in (
        (before.image, after.image, moved.image),
        (before.text, after.text, moved.text),
    ):
        assert torch.equal(a, b)
        assert not torch.allclose(a, c, atol=1e-3)


@pytest.mark.parametrize("name", ["open_clip", "open_clip-timm", "clip"])
def test_unloading_leaves_the_base_and_no_hook(name):
    model, batch = build(name), images_and_texts(0, 2)
    view = backbone_of(model)
    view.prepare()
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    with torch.no_grad():
        base = view.embed_pairs(model, batch).image
    wrapped, _ = prompted(model, tokens=3)
    bare = wrapped.unload()
    assert bare is model
    assert [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()] == hooks
    assert not [n for n, _ in model.named_parameters() if "mmtune" in n]
    with torch.no_grad():
        assert torch.equal(view.embed_pairs(model, batch).image, base)


def fail(*_):
    raise RuntimeError("no memory")


def test_an_error_inside_leaves_nothing_behind():
    """The call after one that failed between entering and leaving is sound."""
    model, batch = build("clip"), images_and_texts(0, 2)
    wrapped, view = prompted(model, tokens=3, seed=1)
    with torch.no_grad():
        want = view.embed_pairs(wrapped, batch).text
        failing = model.text_model.encoder.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="no memory"):
            view.encode_text(wrapped, batch["input_ids"])
        failing.remove()
        assert torch.equal(view.embed_pairs(wrapped, batch).text, want)
        with wrapped.disable_adapter():
            base = view.embed_pairs(wrapped, batch).text
    assert torch.equal(base, backbone_of(build("clip")).embed_pairs(build("clip"), batch).text)


@pytest.mark.filterwarnings(
    "ignore:You are trying to modify", "ignore:Already found a `peft_config`"
)
def test_prompts_and_lora_together():
    """A prompt around LoRA: each can be left out, neither disturbs the other."""
    model, batch = build("clip"), images_and_texts(0, 2)
    inner = get_peft_model(model, lora_config(model, rank=2)).eval()
    with torch.no_grad():
        for n, p in inner.named_parameters():
            if "lora_B" in n:
                p.normal_()
    view = backbone_of(model)
    with torch.no_grad():
        lora = view.embed_pairs(model, batch).text
    prompted(model, tokens=3, seed=1)
    assert model.get_submodule("prompt_text").mmtune_tokens["default"].requires_grad
    with torch.no_grad():
        both = view.embed_pairs(model, batch).text
        assert not torch.allclose(both, lora, atol=1e-3)
        layer = model.get_submodule("prompt_text")
        layer.enable_adapters(False)
        model.get_submodule("prompt_vision").enable_adapters(False)
        assert torch.equal(view.embed_pairs(model, batch).text, lora)


def left_padded(batch):
    """The same words with their padding in front, as generation wants them."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    rows = [torch.cat([i[m == 0], i[m == 1]]) for i, m in zip(ids, mask, strict=True)]
    return {"input_ids": torch.stack(rows), "attention_mask": mask.sort(dim=-1).values}


@pytest.mark.parametrize("name", ["llava", "blip2-opt"])
def test_cached_generation_reads_the_prompt_once(name):
    model = build(name)
    wrapped, _ = prompted(model, tokens=3, branches=["language"], seed=1)
    batch = dict(BACKBONES[name].batch(0, 2))
    batch |= left_padded(batch)
    want, found = greedy(model, batch, 4), cached(wrapped, batch, 4)
    assert torch.allclose(found, want, atol=1e-5)
    with wrapped.disable_adapter():
        assert not torch.allclose(greedy(model, batch, 4), want, atol=1e-3)


def test_captions_are_the_same_with_and_without_a_cache():
    model = build("blip-caption")
    wrapped, _ = prompted(model, tokens=3, branches=["language"], seed=1)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    batch = {"pixel_values": BACKBONES["blip-caption"].batch(0, 2)["pixel_values"]}
    fast, slow = (
        torch.stack(wrapped.generate(**batch, **options, use_cache=use).logits)
        for use in (True, False)
    )
    assert torch.allclose(fast, slow, atol=1e-5)
    with wrapped.disable_adapter():
        base = torch.stack(wrapped.generate(**batch, **options).logits)
    assert not torch.allclose(fast, base, atol=1e-3)


def three_prompts(model):
    wrapped, view = prompted(model, "a", tokens=4, seed=1)
    for seed, name in ((2, "b"), (3, "c")):
        wrapped.add_adapter(name, PromptConfig(tokens=4, seed=seed))
    return wrapped, view


@pytest.mark.parametrize("name", ["open_clip", "open_clip-timm", "clip", "siglip"])
def test_an_ensemble_is_its_prompts_one_by_one(name):
    """Within rounding of float64: matrix products of K b rows may round unlike those of b rows."""
    model = build(name).double()
    wrapped, view = three_prompts(model)
    batch = images_and_texts(0, 2)
    batch["pixel_values"] = batch["pixel_values"].double()
    apart = []
    with torch.no_grad():
        for prompt in "cab":
            wrapped.set_adapter(prompt)
            apart.append(view.embed_pairs(wrapped, batch))
        repeated = {key: torch.cat([value] * 3) for key, value in batch.items()}
        with ensembled(wrapped, ["c", "a", "b"]):
            together = view.embed_pairs(wrapped, repeated)
        mean = ensemble_embeddings(wrapped, batch, ["c", "a", "b"])
        after = view.embed_pairs(wrapped, batch)
    for side in ("image", "text"):
        want = torch.stack([getattr(pairs, side) for pairs in apart])
        assert torch.allclose(getattr(together, side), want.flatten(0, 1), atol=1e-12, rtol=0)
        total = want.sum(0)
        unit = total / total.norm(dim=-1, keepdim=True)
        assert torch.allclose(getattr(mean, side), unit, atol=1e-12, rtol=0)
        assert torch.equal(getattr(after, side), want[2])


def test_an_ensemble_runs_the_frozen_model_once():
    model = build("clip")
    wrapped, _ = three_prompts(model)
    calls = []
    model.text_model.encoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    ensemble_embeddings(wrapped, images_and_texts(0, 2), ["a", "b", "c"])
    assert len(calls) == 1


def test_what_an_ensemble_cannot_take_is_told():
    model = build("clip")
    wrapped, view = three_prompts(model)
    wrapped.add_adapter("long", PromptConfig(tokens=5))
    batch = images_and_texts(0, 4)
    with pytest.raises(ValueError, match="no prompt 'd' in text; it has a, b, c, long"):
        ensemble_embeddings(wrapped, batch, ["a", "d"])
    with pytest.raises(ValueError, match="same places, got a: 4 tokens"):
        ensemble_embeddings(wrapped, batch, ["a", "long"])
    uneven = pytest.raises(ValueError, match="3 equal blocks of rows, got 4 rows")
    with uneven, ensembled(wrapped, ["a", "b", "c"]):
        view.embed_pairs(wrapped, batch)
    with pytest.raises(ValueError, match="0 branches"):
        ensemble_embeddings(build("clip"), batch, ["a"])
    assert all(m.ensemble == () for m in model.modules() if hasattr(m, "ensemble"))


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(-2, 3), min_size=n, max_size=n), min_size=1, max_size=6
        )
    )
)
def test_majority_vote_counts_and_takes_the_lowest_of_equals(rows):
    want = []
    for column in zip(*rows, strict=True):
        votes = Counter(column)
        want.append(min(label for label in votes if votes[label] == max(votes.values())))
    assert majority_vote(torch.tensor(rows)).tolist() == want


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, 3), torch.zeros(0, 3).long()])
def test_votes_are_integers_of_several_prompts(wrong):
    with pytest.raises(ValueError, match="integer labels of K prompts"):
        majority_vote(wrong)
