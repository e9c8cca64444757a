"""Covariances of keys: what is summed, and when a kept one is taken."""

from __future__ import annotations

import shutil

import pytest
import torch

from editing.closed_form import covariances as module
from editing.closed_form.covariances import covariances
from editing.closed_form.texts import CovarianceError, sampled, spoken
from editing.edits import ContextEdit
from editing.requests import EditRequest
from tests.editing.closed_form_cases import TEXT, covariance
from tests.editing.edit_items import item, write
from tests.editing.tiny import BARE, bits, made, picture, same_bits, tiny


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Nothing is remembered from other tests; files alone are."""
    monkeypatch.setattr(module, "_KNOWN", module.WeakKeyDictionary())


def forget():
    module._KNOWN.clear()


def sites(mllm, layers="all"):
    return mllm.backbone.select(["language"], ["fc2"], layers)


def inputs(mllm, site, forward):
    """[n, d] what the module at a site is given, by a hook of its own."""
    found = []
    handle = site.module.register_forward_pre_hook(
        lambda _, args: found.append(args[0].detach().double().reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        forward()
    handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize("name", ["blip2-opt", "llava", "blip2-t5"])
def test_the_mean_is_over_every_token_whatever_the_batches(name, tmp_path):
    mllm = tiny(name)
    lm = mllm.model.language_model if name.startswith("blip2") else mllm.model.model.language_model
    site = sites(mllm)[1]

    def one(text):
        ids = mllm.tokenizer(text, return_tensors="pt")["input_ids"]
        if name != "blip2-t5":
            return lm(input_ids=ids)
        words = text.split()  # the first half is read, the second is answered
        half = " ".join(words[: len(words) // 2])
        return lm.encoder(input_ids=mllm.tokenizer(half, return_tensors="pt")["input_ids"])

    keys = torch.cat([inputs(mllm, site, lambda t=t: one(t)) for t in TEXT[:20]])
    (tmp_path / "few").write_text("\n".join(["", *TEXT[:20]]))
    for size in (1, 7):
        forget()
        cache = str(tmp_path / f"{size}")
        chosen = covariance(
            tmp_path, texts=str(tmp_path / "few"), tokens=9999, batch_size=size, cache=cache
        )
        (found,) = covariances(mllm, [site], chosen)
        assert found.tokens == len(keys)
        direct = (keys.T @ keys / len(keys)).float()
        torch.testing.assert_close(found.moment, direct, rtol=1e-4, atol=1e-6 * direct.abs().max())


def test_a_decoder_is_read_at_the_words_that_it_answers(tmp_path):
    mllm = tiny("blip2-t5")
    (tmp_path / "one").write_text("w5 w6 w7 w8")
    lm, site = mllm.model.language_model, sites(mllm)[-1]
    ids = mllm.tokenizer("w5 w6", return_tensors="pt")["input_ids"]
    answer = torch.tensor([[0, *mllm.tokenizer("w7 w8")["input_ids"][:2]]])
    keys = inputs(mllm, site, lambda: lm(input_ids=ids, decoder_input_ids=answer))
    (found,) = covariances(mllm, [site], covariance(tmp_path, texts=str(tmp_path / "one")))
    assert found.tokens == 3
    torch.testing.assert_close(found.moment, (keys.T @ keys / 3).float(), rtol=1e-4, atol=1e-6)


def test_the_first_tokens_count_up_to_the_number_asked_for(tmp_path):
    mllm = tiny("llava")
    found = [
        covariances(mllm, sites(mllm), covariance(tmp_path, tokens=37, batch_size=b, cache=str(c)))
        for b, c in ((1, tmp_path / "a"), (16, tmp_path / "b"))
    ]
    assert [[c.tokens for c in pair] for pair in found] == [[37, 37], [37, 37]]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.moment, other.moment, rtol=1e-4, atol=1e-7)
    forget()
    more = covariances(mllm, sites(mllm), covariance(tmp_path, tokens=38))
    assert [c.tokens for c in more] == [38, 38]


def test_a_kept_covariance_has_the_same_bits_and_is_not_computed_again(tmp_path, monkeypatch):
    chosen = covariance(tmp_path)
    mllm = tiny("blip2-opt")
    first = covariances(mllm, sites(mllm), chosen)
    forget()
    monkeypatch.setattr(module, "measured", lambda *_: pytest.fail("computed again"))
    again = tiny("blip2-opt")
    for one, other in zip(first, covariances(again, sites(again), chosen), strict=True):
        assert torch.equal(one.moment, other.moment)
        assert one.tokens == other.tokens == 100
    assert not list((tmp_path / "cache").glob(".*"))  # nothing half-written is left


@pytest.mark.parametrize(
    "change",
    [
        lambda mllm: mllm.model.get_parameter("language_model.lm_head.weight").data.mul_(2),
        lambda mllm: mllm.model.get_parameter("vision_model.post_layernorm.bias").data.add_(1),
    ],
)
def test_another_model_has_another(change, tmp_path):
    chosen, mllm = covariance(tmp_path), tiny("blip2-opt")
    covariances(mllm, sites(mllm, "last:1"), chosen)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    change(mllm)
    covariances(mllm, sites(mllm, "last:1"), chosen)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_file_of_another_layer_is_refused(tmp_path):
    chosen, mllm = covariance(tmp_path), tiny("llava")
    covariances(mllm, sites(mllm), chosen)
    one, other = sorted((tmp_path / "cache").iterdir())
    shutil.copy(one, other)
    forget()
    with pytest.raises(CovarianceError, match=r"of another model, layer or text.*delete it"):
        covariances(mllm, sites(mllm), chosen)
    other.write_bytes(b"nothing")
    with pytest.raises(CovarianceError, match="no covariance that can be read"):
        covariances(mllm, sites(mllm), chosen)


def test_it_is_of_the_unedited_model(tmp_path):
    mllm = tiny("llava")
    plain = covariances(mllm, sites(mllm), covariance(tmp_path))
    forget()
    before = bits(mllm.model)
    with made(mllm).applied(mllm), ContextEdit("w5 w5 ").applied(mllm):
        inside = bits(mllm.model)
        chosen = covariance(tmp_path, cache=str(tmp_path / "other"))
        under = covariances(mllm, sites(mllm), chosen)
        assert same_bits(mllm.model, inside)
        assert mllm.batch([BARE]).prefaces == ("w5 w5 ",)
    assert same_bits(mllm.model, before)
    for one, other in zip(plain, under, strict=True):
        assert torch.equal(one.moment, other.moment)


def test_the_models_own_texts_depend_on_their_seed_alone(tmp_path):
    mllm = tiny("llava")
    state = torch.get_rng_state()
    found = []
    for name, seed, size in (("a", 1, 4), ("b", 1, 8), ("c", 2, 4)):
        forget()
        chosen = covariance(
            tmp_path, texts="", seed=seed, batch_size=size, tokens=200, cache=str(tmp_path / name)
        )
        found += covariances(mllm, sites(mllm, "last:1"), chosen)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(found[0].moment, found[1].moment, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found[0].moment, found[2].moment, rtol=1e-2)


def test_records_are_asked_about_their_images(tmp_path):
    mllm = tiny("llava")
    names = ("a.png", "b.png", "c.png")
    for seed, name in enumerate(names):
        (tmp_path / name).write_bytes(picture(seed).data)
    shown = dict(zip(("image", "image_rephrase", "m_loc"), names, strict=True))
    asked = {"src": "w5 w6", "pred": "w9 w10", "alt": "w7 w8"}
    file = write(tmp_path / "records.json", [item(**shown, **asked)])
    (found,) = covariances(mllm, sites(mllm, "last:1"), covariance(tmp_path, texts=file))
    batch = mllm.batch([EditRequest("w5 w6", "w9 w10", picture(0))])
    keys = inputs(mllm, sites(mllm)[-1], lambda: mllm.answer_logits(batch))
    assert found.tokens == len(keys)
    torch.testing.assert_close(found.moment, (keys.T @ keys / len(keys)).float())


def test_what_cannot_be_read(tmp_path):
    mllm = tiny("llava")
    with pytest.raises(CovarianceError, match=r"covariance\.texts names .*nowhere.*no such file"):
        covariances(mllm, sites(mllm), covariance(tmp_path, texts=str(tmp_path / "nowhere")))
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(CovarianceError, match="holds no texts"):
        covariances(mllm, sites(mllm), covariance(tmp_path, texts=str(tmp_path / "empty")))


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "llava", "qwen3-vl"])
@torch.no_grad()
def test_texts_are_drawn_from_what_the_model_expects(name):
    """Token by token, each from the scores of a pass that keeps nothing."""
    mllm, starts, tokens = tiny(name), ["w5 w6", "w7"], 5
    never = [*mllm.tokenizer.all_special_ids, *mllm.backbone.ends]
    generator, ids = torch.Generator().manual_seed(3), torch.zeros(2, 0, dtype=torch.int64)
    end = torch.full((2, 1), mllm.backbone.ends[0])
    for _ in range(tokens):
        following = torch.cat([ids, end], dim=1)
        scores = mllm.answer_logits(spoken(mllm, starts, following, torch.ones_like(following)))[
            :, -1
        ].double()
        scores[:, never] = -torch.inf
        scores[:, len(mllm.tokenizer) :] = -torch.inf
        ids = torch.cat([ids, torch.multinomial(scores.softmax(-1), 1, generator=generator)], dim=1)
    words = mllm.tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)
    want = [f"{start} {text.strip()}" for start, text in zip(starts, words, strict=True)]
    assert sampled(mllm, starts, tokens, torch.Generator().manual_seed(3)) == want
