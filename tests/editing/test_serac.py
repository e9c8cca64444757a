"""SERAC as an edit: what is answered from memory and what is not, and memories that grow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from editing.edits import EditError, StackedEdit, load, stack
from editing.methods.base import editor
from editing.methods.serac import Serac, SeracOptions
from editing.methods.serac_memory import told
from editing.methods.serac_network import Adapter, SeracNetwork
from editing.methods.serac_scope import REFERENCE_EPS, counterfactual_context, mixture
from editing.requests import EditRequest
from tests.editing.tiny import (
    BARE,
    CAPTION,
    MODELS,
    OTHER,
    PROBES,
    REQUEST,
    SECOND,
    SEEN,
    bits,
    drawn,
    made,
    picture,
    same_bits,
    tiny,
)

EVERY = pytest.mark.parametrize("name", MODELS)
NEAR = {"words_near": 0.999, "image_near": 0.99999}  # of a random model: itself, and no other
ASKED = [SEEN, BARE, OTHER, CAPTION]
WITHOUT = EditRequest(BARE.question, "w44", id="bare")


def serac(**options):
    return Serac(SeracOptions(**(NEAR | options)))


def scores(mllm, probes=ASKED):
    return mllm.answer_logits(mllm.batch(probes))


def counterfactual(mllm, probes, requests):
    """What the model says after it was told."""
    texts = [counterfactual_context(r.question, r.target) for r in requests]
    with told(mllm, probes, texts) as batch:
        return mllm.answer_logits(batch), mllm.answer(batch)


def hooks(mllm):
    """Of Linears; transformers has hooks of its own elsewhere."""
    linears = [m for m in mllm.model.modules() if isinstance(m, torch.nn.Linear)]
    return [hook for linear in linears for hook in linear._forward_hooks]


def loud(mllm, seed=5):
    """A network with the fixed scope and a change of low rank that is not zero."""
    chosen = serac()
    network = chosen.network(mllm)
    shapes = {
        name.removesuffix(".weight"): (weight.shape[0], weight.shape[1])
        for name, weight in chosen.weights(mllm).items()
    }
    adapter = Adapter(shapes, 2, torch.Generator().manual_seed(seed))
    for number, left in enumerate(adapter.left):
        left.data = drawn(left.shape, seed + number)
    return SeracNetwork(network.scope, adapter).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((n, torch.float32) for n in MODELS), ("llava", torch.bfloat16)]
)
@torch.no_grad()
def test_out_of_scope_is_untouched_to_the_bit_and_in_scope_is_told(name, dtype):
    mllm = tiny(name, dtype)
    before, base, said = bits(mllm.model), scores(mllm), mllm.answer(ASKED)
    edit = serac().edit(mllm, [REQUEST, WITHOUT])
    want, words = counterfactual(mllm, ASKED[:2], [REQUEST, WITHOUT])
    with edit.applied(mllm):
        found = scores(mllm)
        assert mllm.answer(ASKED) == [*words, *said[2:]]
        assert torch.equal(found[2:], base[2:])
        torch.testing.assert_close(found[:2, : want.shape[1]], want)
        assert not torch.equal(found[:2], base[:2])
        assert torch.equal(scores(mllm, [OTHER, CAPTION]), scores_without(mllm, edit, base))
        with pytest.raises(TypeError, match="changes answers only"):
            mllm.sequences(mllm.batch([SEEN]))
    assert same_bits(mllm.model, before)
    assert torch.equal(scores(mllm), base)
    assert mllm.around == []


def scores_without(mllm, edit, base):
    """Of [OTHER, CAPTION] in a batch of their own, by the model without the edit."""
    around, mllm.around = mllm.around, []
    try:
        return scores(mllm, [OTHER, CAPTION])
    finally:
        mllm.around = around


@torch.no_grad()
def test_only_questions_in_scope_cost_a_pass():
    mllm = tiny("llava")
    edit = serac().edit(mllm, [REQUEST])
    sizes = []
    stock = mllm._logits
    mllm._logits = lambda weights, batch: sizes.append(len(batch)) or stock(weights, batch)
    with edit.applied(mllm):
        scores(mllm)
        assert sizes == [4, 1]
        sizes.clear()
        scores(mllm, [OTHER, BARE])
        assert sizes == [2]
        sizes.clear()
        scores(mllm, [SEEN, SEEN])  # all in scope: the model as it is says nothing
        assert sizes == [2]


@EVERY
@torch.no_grad()
def test_the_answer_of_a_question_decides_nothing_unless_it_is_asked_for(name):
    mllm = tiny(name)
    probes = [replace(p, answer="w40 w41") for p in ASKED]
    edit = serac().edit(mllm, [REQUEST])
    leaking = serac(scope="reference").edit(mllm, [REQUEST])
    for one in (edit, leaking):
        with one.applied(mllm) as inside:
            interceptor = inside.around[-1]
            found = [interceptor._scope(inside.batch(p)).log_similarity for p in (ASKED, probes)]
        assert torch.equal(*found) == (one is edit)
        # The released code finds the edit where the answer is the target: it reads it.
        assert (found[1] > -0.01).tolist() == [True, False, False, False]


@EVERY
@torch.no_grad()
def test_a_soft_mixture(name):
    mllm = tiny(name)
    base = scores(mllm)
    edit = serac(mix="soft", words_near=0.6, image_near=0.6).edit(mllm, [REQUEST])
    want, _ = counterfactual(mllm, ASKED, [REQUEST] * 4)
    with edit.applied(mllm) as inside:
        found = scores(mllm)
        shares = inside.around[-1]._scope(inside.batch(ASKED)).log_similarity
    assert shares[0] > -1e-5
    assert -3 < shares[2] < -1e-4  # in part
    mixed = mixture(base, want, shares)
    said = mllm.batch(ASKED).target_mask[[0, 2]] == 1  # what stands behind a target says nothing
    torch.testing.assert_close(found[[0, 2]][said], mixed[[0, 2]][said], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[[0, 2]].exp().sum(-1), torch.ones(2, found.shape[1]))
    assert torch.equal(found[1], base[1])  # no image: out of scope, and worth no pass

    theirs = serac(mix="reference", words_near=0.6, image_near=0.6).edit(mllm, [REQUEST])
    with theirs.applied(mllm):
        found = scores(mllm)
    torch.testing.assert_close(found, mixture(base, want, shares, REFERENCE_EPS))


@torch.no_grad()
def test_with_a_soft_mixture_the_larger_share_writes():
    mllm = tiny("llava")
    said = mllm.answer([SEEN, OTHER])
    _, words = counterfactual(mllm, [SEEN, OTHER], [REQUEST] * 2)
    assert words[1] != said[1]
    for near, want in ((0.01, words), (0.6, [words[0], said[1]])):
        edit = serac(mix="soft", words_near=near, image_near=near).edit(mllm, [REQUEST])
        with edit.applied(mllm) as inside:
            share = inside.around[-1]._scope(inside.batch([SEEN, OTHER])).log_similarity.exp()[1]
            assert (share > 0.5) == (want == words)
            assert 0.1 < share < 0.9
            assert mllm.answer([SEEN, OTHER]) == want
            # The likeliest of the mixture is not what is written: no short cut by scores.
            asked = mllm.batch([SEEN, OTHER])
            sure = torch.nn.functional.one_hot(asked.target_ids, 60).float()
            assert mllm.answers(asked, sure) == want


@EVERY
@torch.no_grad()
def test_the_adapter_acts_on_what_is_told_and_on_nothing_else(name):
    mllm = tiny(name)
    network, base = loud(mllm), scores(mllm)
    before = bits(mllm.model)
    plain = serac().edit(mllm, [REQUEST])
    edit = serac().edit_with(mllm, network, [REQUEST], torch.Generator())
    with plain.applied(mllm):
        told_only = scores(mllm)
    with edit.applied(mllm):
        found = scores(mllm)
    assert torch.equal(found[1:], base[1:])
    assert (found[0] - told_only[0]).abs().max() > 1e-3
    # The hooks compute what changed weights compute.
    adapter = network.adapter
    weights = {
        f"{path}.weight": mllm.model.get_submodule(path).weight + left @ right
        for path, left, right in zip(adapter.paths, adapter.left, adapter.right, strict=True)
    }
    with told(mllm, [SEEN], [counterfactual_context(REQUEST.question, REQUEST.target)]) as batch:
        want = mllm.answer_logits(batch, weights)
    torch.testing.assert_close(found[:1, : want.shape[1]], want, rtol=1e-4, atol=1e-4)
    assert same_bits(mllm.model, before)
    assert hooks(mllm) == []


@torch.no_grad()
def test_an_exception_inside_leaves_no_hook_behind():
    mllm = tiny("llava")
    edit = serac().edit_with(mllm, loud(mllm), [REQUEST], torch.Generator())
    long = replace(SEEN, answer=" ".join(["w20"] * 60))
    with pytest.raises(ValueError, match="reads at most"), edit.applied(mllm):
        scores(mllm, [long])
    assert mllm.around == []
    assert hooks(mllm) == []


@EVERY
@torch.no_grad()
def test_saved_and_loaded_is_the_same_edit(name, tmp_path):
    mllm = tiny(name)
    edit = serac().edit_with(mllm, loud(mllm), [REQUEST, WITHOUT], torch.Generator())
    edit.save(tmp_path / "edit")
    loaded = load(tmp_path / "edit")
    assert loaded.about == edit.about
    found = []
    for one in (edit, loaded):
        with one.applied(tiny(name)) as other:
            found.append((scores(other), other.answer(ASKED)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    loaded.save(tmp_path / "again")
    for file in ("edit.json", "edit.safetensors"):
        a, b = ((tmp_path / f / file).read_bytes() for f in ("edit", "again"))
        assert a == b


@torch.no_grad()
def test_a_memory_grows_and_each_question_finds_its_edit():
    mllm = tiny("llava")
    before, said = bits(mllm.model), mllm.answer([OTHER, CAPTION])
    requests = [
        EditRequest(f"w{10 + i} w{30 + i}", f"w{45 + i}", picture(20 + i), id=str(i))
        for i in range(10)
    ]
    maker = serac()
    edit = maker.edit(mllm, requests[:1])
    for request in requests[1:]:
        edit = maker.extend(mllm, edit, [request])
    assert edit.kind == "serac"
    assert [r["id"] for r in edit.about["requests"]] == [str(i) for i in range(10)]
    assert edit.about["facts"] == 10
    together = maker.edit(mllm, requests)
    _, words = counterfactual(mllm, [maker_probe(r) for r in requests], requests)
    for one in (edit, together):
        with one.applied(mllm):
            assert mllm.answer(requests) == words
            assert mllm.answer([OTHER, CAPTION]) == said
    assert same_bits(mllm.model, before)


def maker_probe(request):
    return replace(SEEN, question=request.question, answer=request.target, image=request.image)


@torch.no_grad()
def test_of_two_edits_that_ask_the_same_the_later_one_holds():
    mllm = tiny("llava")
    again, maker = replace(REQUEST, target="w55"), serac()
    one = maker.edit(mllm, [REQUEST, SECOND])
    for edit in (maker.extend(mllm, one, [again]), maker.edit(mllm, [REQUEST, SECOND, again])):
        assert [f.target for f in edit.memory.facts] == ["w42", "w55"]
    other_image = maker.extend(mllm, one, [replace(REQUEST, image=picture(9), target="w55")])
    no_image = maker.extend(mllm, one, [replace(REQUEST, image=None, target="w55")])
    assert len(other_image.memory.facts) == len(no_image.memory.facts) == 3


@torch.no_grad()
def test_unlike_memories_are_stacked_and_stacks_are_undone():
    mllm = tiny("llava")
    before, base = bits(mllm.model), scores(mllm)
    first = serac().edit(mllm, [REQUEST])
    second = serac(mix="soft").edit(mllm, [SECOND])
    both = first.then(second)
    assert isinstance(both, StackedEdit)
    assert isinstance(first.then(made(mllm)), StackedEdit)
    alone = []
    for one in (first, second):
        with one.applied(mllm):
            alone.append(mllm.answer([SEEN, OTHER]))
    with both.applied(mllm):
        assert mllm.answer([SEEN, OTHER]) == [alone[0][0], alone[1][1]]
    assert torch.equal(scores(mllm), base)
    assert same_bits(mllm.model, before)


@torch.no_grad()
def test_a_memory_knows_its_questions_when_weights_are_edited_too():
    mllm = tiny("llava")
    weights, edit = made(mllm), serac().edit(mllm, [REQUEST])
    with edit.applied(mllm) as inside:
        want = inside.around[-1]._scope(inside.batch(ASKED))
    with stack([weights, edit]).applied(mllm) as inside:
        found = inside.around[-1]._scope(inside.batch(ASKED))
        assert torch.equal(found.log_similarity, want.log_similarity)
    with weights.applied(mllm):
        edited = scores(mllm)
        with serac().edit(mllm, [REQUEST]).applied(mllm):
            assert torch.equal(scores(mllm)[1:], edited[1:])
            assert not torch.equal(scores(mllm)[0], edited[0])


@torch.no_grad()
def test_another_model_is_refused():
    edit = serac().edit(tiny("llava"), [REQUEST])
    other = tiny("llava")
    with torch.no_grad():
        next(iter(serac().weights(other).values())).data[0, 0] += 1e-3
    with pytest.raises(EditError, match="not the model that this serac edit was made on"):
        edit.applied(other).__enter__()
    with edit.applied(other, strict=False):
        pass
    loud_edit = serac().edit_with(tiny("llava"), loud(tiny("llava")), [REQUEST], torch.Generator())
    with pytest.raises(EditError, match="lacks layers"):
        loud_edit.applied(tiny("blip2-opt"), strict=False).__enter__()
    assert other.around == []


def test_wrong_settings():
    assert editor("serac").settings == SeracOptions()
    with pytest.raises(ValueError, match="holds no trained editor"):
        Serac(SeracOptions(trained="/nowhere"))


@torch.no_grad()
def test_every_probe_of_the_tiny_set_can_be_asked():
    mllm = tiny("blip2-opt")
    with serac(mix="reference").edit(mllm, [REQUEST]).applied(mllm):
        assert scores(mllm, PROBES).isfinite().all()
        assert len(mllm.answer(PROBES)) == len(PROBES)
