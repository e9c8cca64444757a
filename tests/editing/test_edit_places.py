"""The token at which an edit sits is the one that it says, padded or not, with an image or not."""

from __future__ import annotations

import pytest
import torch

from editing.closed_form.places import columns_of, index_of, stack_of, tapped, valid
from editing.closed_form.values import contexts_of, in_contexts, read_at
from editing.edits import ContextEdit
from editing.methods.base import editor
from editing.methods.memit import MemitOptions
from editing.methods.rome import RomeOptions
from editing.requests import EditRequest
from mmtune.backbones.base import SiteError
from tests.editing.closed_form_cases import BARE, MODELS, ONE, TWO, covariance
from tests.editing.tiny import CAPTION, SEEN, tiny

LONG = EditRequest("w3 w4 w5 w6 w7 w8 w9", "w44 w45 w46", SEEN.image, subject="w5 w6")
ASKED = [ONE, LONG, BARE, TWO]


def fc2(mllm, layers="all"):
    return mllm.backbone.select(["language"], ["fc2"], layers)


def words_at(mllm, batch, columns):
    found = [""] * len(batch)
    for part in batch.parts:
        for ids, row in zip(part.prompts["input_ids"], part.rows.tolist(), strict=True):
            found[row] = mllm.tokenizer.decode(ids[columns[row]])
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_question_and_the_subject_end_where_they_end(name):
    mllm = tiny(name)
    with ContextEdit("w50 w51 ").applied(mllm):
        batch = mllm.batch(ASKED)
        columns = columns_of(mllm, batch, "question", [""] * 4)
        assert words_at(mllm, batch, columns) == ["w8", "w9", "w12", "w4"]
        subjects = ["w9 w7", "w5 w6", " w11 ", "w6"]
        columns = columns_of(mllm, batch, "subject", subjects)
        assert words_at(mllm, batch, columns) == ["w7", "w6", "w11", "w6"]
        last = columns_of(mllm, batch, "prompt", [""] * 4)
        for part in batch.parts:
            mask = part.prompts["attention_mask"]
            assert mask.gather(1, last[part.rows][:, None]).all()
            assert not mask.gather(1, (last[part.rows][:, None] + 1).clamp(max=mask.shape[1] - 1))[
                last[part.rows] + 1 < mask.shape[1]
            ].any()


@pytest.mark.parametrize("place", ["prompt", "question", "subject"])
@pytest.mark.parametrize("name", MODELS)
def test_keys_do_not_depend_on_what_else_is_in_the_batch(name, place):
    mllm = tiny(name)
    asked = [LONG, BARE] if place == "subject" else ASKED
    sites = [s for s in fc2(mllm) if place == "prompt" or stack_of(mllm.backbone, s) != "decoder"]
    with in_contexts(mllm):
        whole = contexts_of(mllm, asked, place, ["w30 w31. "], [])
        together = read_at(mllm, whole, sites, {})
        alone = [contexts_of(mllm, [r], place, ["w30 w31. "], []) for r in asked]
        apart = [read_at(mllm, one, sites, {}) for one in alone]
    for site in sites:
        for which in (0, 1):
            rows = torch.cat([read[site.path][which] for read in apart])
            torch.testing.assert_close(together[site.path][which], rows, rtol=1e-4, atol=1e-5)
        means = torch.cat([o.mean(r[site.path][0]) for o, r in zip(alone, apart, strict=True)])
        torch.testing.assert_close(whole.mean(together[site.path][0]), means, rtol=1e-4, atol=1e-5)
        assert means.std(0).max() > 1e-5 or stack_of(mllm.backbone, site) == "decoder"


@pytest.mark.parametrize("name", MODELS)
def test_the_prompts_place_predicts_the_answers_first_token(name):
    """Nothing above the top layer mixes tokens: a shift there moves the scores of its own only."""
    mllm = tiny(name)
    site = fc2(mllm)[-1]
    stack = stack_of(mllm.backbone, site)
    batch = mllm.batch(ASKED)
    columns = columns_of(mllm, batch, "prompt", [""] * 4)

    def shifted(part, given, out):
        out = out.clone()
        spots = index_of(batch, part, stack, columns, out.shape[1])
        out[torch.arange(len(spots)), spots] += torch.linspace(-3, 3, out.shape[-1])
        return out

    before = mllm.answer_logits(batch)
    with tapped(batch, {"it": (site.module, shifted)}):
        after = mllm.answer_logits(batch)
    assert ((after - before)[:, 0].abs().amax(1) > 1e-3).all()
    assert torch.equal(after[:, 1:], before[:, 1:])
    assert torch.equal(mllm.answer_logits(batch), before)


@pytest.mark.parametrize("name", MODELS)
def test_padding_is_not_valid(name):
    mllm = tiny(name)
    batch = mllm.batch(ASKED)
    for site in fc2(mllm):
        stack, found = stack_of(mllm.backbone, site), {}

        def see(part, given, out, stack=stack, found=found):
            marks = valid(batch, part, stack, given.shape[1])
            assert marks.shape == given.shape[:2]
            for row, count in zip(part.rows.tolist(), marks.sum(1).tolist(), strict=True):
                found[row] = count

        with tapped(batch, {"it": (site.module, see)}):
            mllm.answer_logits(batch)
        lengths = {}
        for number, request in enumerate(ASKED):
            one, seen = mllm.batch([request]), []
            handle = site.module.register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0].numel() // args[0].shape[-1])
            )
            mllm.answer_logits(one)
            handle.remove()
            lengths[number] = seen[0]
        assert found == lengths


def test_the_essence_is_asked_where_there_is_one():
    mllm = tiny("llava")
    caption = EditRequest("", "w26", CAPTION.image)
    with in_contexts(mllm):
        made = contexts_of(mllm, [ONE, BARE, caption], "prompt", ["w30. ", "w31. "], [])
        about = contexts_of(mllm, [BARE], "subject", [], [])
    probes = made.batch.probes
    assert made.owner.tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
    assert made.plain.tolist() == [True, False, False, False, True, False, False, True]
    assert made.essence.tolist() == [False, False, False, True, *[False] * 4]
    assert (probes[3].question, probes[3].image) == ("", ONE.image)
    assert made.batch.prefaces == ("", "w30. ", "w31. ", "", "", "w30. ", "w31. ", "")
    assert [p.question for p in about.batch.probes] == [BARE.question, "w11 is a"]
    assert not mllm.around


def test_a_failing_batch_leaves_nothing_behind():
    mllm = tiny("llava")
    batch, site = mllm.batch([ONE]), fc2(mllm)[0]
    with pytest.raises(RuntimeError, match="here"), tapped(batch, {"it": (site.module, _fail)}):
        mllm.answer_logits(batch)
    mllm.answer_logits(batch)
    assert not site.module._forward_hooks


def _fail(part, given, out):
    raise RuntimeError("here")


def layers_of(name, kind, place, tmp_path, **settings):
    settings |= {"place": place, "covariance": covariance(tmp_path)}
    made = editor(kind, (RomeOptions if kind == "rome" else MemitOptions)(**settings))
    layers = made.settings.layer if kind == "rome" else made.settings.layers
    layers = [layers] if isinstance(layers, int) else layers
    return [s.layer for s, _ in made.places(tiny(name), layers, 5).values()]


def test_layers_follow_the_place(tmp_path):
    assert layers_of("llava", "memit", "prompt", tmp_path) == [0]
    assert layers_of("blip2-t5", "memit", "prompt", tmp_path) == [2]
    assert layers_of("blip2-t5", "memit", "subject", tmp_path) == [0]
    assert layers_of("blip2-t5", "rome", "prompt", tmp_path, layer=-1) == [3]
    assert layers_of("blip2-t5", "memit", "prompt", tmp_path, layers="first:2") == [0, 1]


def test_the_published_layers_of_a_model_of_32(tmp_path, monkeypatch):
    mllm = tiny("llava")
    site = fc2(mllm)[0]
    many = [type(site)("language", i, "fc2", site.path, site.module) for i in range(32)]
    monkeypatch.setattr(type(mllm.backbone), "select", lambda *_: many)
    monkeypatch.setattr(
        "editing.closed_form.base.parameters_of", lambda *_: {f"{site.path}.weight": None}
    )
    for place, last in (("subject", 8), ("prompt", 21)):
        chosen = editor("rome", RomeOptions(place=place)).places(mllm, None, 1)
        assert [s.layer for s, _ in chosen.values()] == [last]


def test_places_that_are_not_there(tmp_path):
    mllm = tiny("blip2-t5")

    def edit(request=ONE, **settings):
        settings = {"covariance": covariance(tmp_path), "prefixes": 0, **settings}
        return editor("rome", RomeOptions(**settings)).edit(mllm, [request])

    with pytest.raises(
        ValueError, match=r"'w5 w9 w7 w8' holds no subject ''.*EditRequest\.subject"
    ):
        edit(place="subject")
    with pytest.raises(ValueError, match=r"holds no subject 'w33'"):
        edit(EditRequest("w5", "w6", subject="w33"), place="subject")
    with pytest.raises(ValueError, match="holds no question"):
        edit(EditRequest("", "w6", CAPTION.image), place="question")
    with pytest.raises(SiteError, match=r"rome edits the language region.*got region 'vision'"):
        edit(region="vision")
    with pytest.raises(SiteError, match=r"layers \[3\] are in the decoder, .*of the encoder"):
        edit(place="question", layer=3)
    both = MemitOptions(covariance=covariance(tmp_path), layers="all")
    with pytest.raises(SiteError, match="are in the decoder and the encoder"):
        editor("memit", both).edit(mllm, [ONE])
    with pytest.raises(SiteError, match="no layer 9 in language"):
        edit(layer=9)
