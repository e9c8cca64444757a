"""SERAC trained: what it learns in a few dozen steps, and what it never sees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from editing.edits import load
from editing.features import Features, features_of
from editing.meta.base import TrainedError
from editing.meta.config import MetaTrainingOptions
from editing.meta.training import train_editor
from editing.methods.serac import Serac, SeracOptions
from editing.methods.serac_network import APART, FixedScope, TrainedScope
from editing.methods.serac_scope import question_text
from editing.methods.serac_training import CHANGED, KEPT, scope_loss
from editing.requests import EditRecord, EditRequest, Probe
from tests.editing.synthetic import look, records, words
from tests.editing.tiny import MODELS, bits, drawn, same_bits, tiny

OPTIONS = SeracOptions(rank=2, width=32)
STEPS, TOGETHER = 25, 6
HELD = records(200, 8)


def begun(mllm, options=OPTIONS):
    return Serac(options).begin(mllm, torch.Generator().manual_seed(0)).train()


def trained_on(mllm, maker, network, steps, rate=3e-3):
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate)
    for step in range(steps):
        batch = records(TOGETHER * step, TOGETHER)
        losses = maker.losses(mllm, network, batch, torch.Generator())
        optimiser.zero_grad()
        sum(losses.values()).backward()
        optimiser.step()
    return losses


@pytest.fixture(scope="module")
def llava():
    """(model, editor, its trained scope), the weights of the model looked after."""
    mllm, maker = tiny("llava"), Serac(SeracOptions(rank=0, width=32))
    before, network = bits(mllm.model), begun(mllm, maker.settings)
    trained_on(mllm, maker, network, STEPS)
    assert same_bits(mllm.model, before)
    return mllm, maker, network.eval()


def probes_of(kind):
    return [getattr(record, kind)[0] for record in HELD]


def similarities(mllm, network, probes):
    with torch.no_grad():
        cached = features_of(mllm, [record.request for record in HELD])
        return network.scope(features_of(mllm, probes), cached).exp()


def test_a_few_dozen_steps_tell_in_scope_from_out(llava):
    """On records that were not trained on."""
    mllm, _, network = llava
    others = [
        Probe(HELD[i - 1].request.question, "w50", HELD[i].request.image) for i in range(len(HELD))
    ]
    inside = [
        similarities(mllm, network, probes_of(k)) for k in ("text_generality", "image_generality")
    ]
    outside = [
        similarities(mllm, network, p)
        for p in (probes_of("text_locality"), probes_of("image_locality"), others)
    ]
    right = torch.cat([found.argmax(1) == torch.arange(len(HELD)) for found in inside])
    found = (
        torch.cat([found.diagonal() for found in inside]),
        torch.cat([o.amax(1) for o in outside]),
    )
    assert right.float().mean() >= 0.9
    assert (found[0] > 0.5).float().mean() >= 0.75
    assert (found[1] > 0.5).float().mean() <= 0.15
    # An edit that is asked again is wholly in scope.
    again = similarities(mllm, network, [record.request for record in HELD])
    torch.testing.assert_close(again.diagonal(), torch.ones(len(HELD)))


def test_records_that_were_not_trained_on_lose_less(llava):
    mllm, maker, network = llava
    fresh = begun(mllm, maker.settings)
    fresh.scope.observe(features_of(mllm, [record.request for record in records(0, 30)]))
    with torch.no_grad():
        lost = [scope_loss(mllm, n.eval().scope, HELD).item() for n in (network, fresh)]
    assert lost[0] < 0.7 * lost[1]


def test_a_trained_editor_is_saved_read_and_edits(llava, tmp_path):
    mllm, maker, network = llava
    maker.save_trained(tmp_path / "trained", network, mllm)
    again = Serac(SeracOptions(trained=str(tmp_path / "trained")))
    assert again.settings.width == 32
    requests = [record.request for record in HELD]
    with torch.no_grad():
        edit = again.edit(mllm, requests[:4])
        edit = again.extend(mllm, edit, requests[4:])
        edit.save(tmp_path / "edit")
        same = maker.edit_with(mllm, network, requests, torch.Generator())
        probes = [*probes_of("image_generality"), *probes_of("text_locality")]
        base, found = mllm.answer_logits(mllm.batch(probes)), []
        for one in (edit, load(tmp_path / "edit"), same):
            with one.applied(tiny("llava")) as other:
                found.append(other.answer_logits(other.batch(probes)))
    assert edit.about["facts"] == len(HELD)
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])
    touched = (found[0] != base).flatten(1).any(1)
    assert touched[: len(HELD)].float().mean() >= 0.9
    assert touched[len(HELD) :].float().mean() <= 0.15
    with pytest.raises(TrainedError, match="another model"):
        again.edit(tiny("blip2-opt"), requests)
    with pytest.raises(TrainedError, match="trained with rank = 0"):
        Serac(SeracOptions(trained=str(tmp_path / "trained"), rank=3))


def test_the_training_of_editors_trains_it(tmp_path):
    options = MetaTrainingOptions(
        steps=3, batch_size=4, lr=1e-2, accumulation=1, validate_every=2, log_every=1, save_every=2
    )
    mllm, given = tiny("blip2-opt"), (records(0, 8), HELD[:3])
    before = bits(mllm.model)
    result = train_editor(Serac(OPTIONS), mllm, *given, options, tmp_path, progress=False)
    assert result.steps == 3
    assert same_bits(mllm.model, before)
    again = Serac(SeracOptions(trained=str(tmp_path / "trained")))
    requests = [record.request for record in HELD[:2]]
    with torch.no_grad(), again.edit(mllm, requests).applied(mllm):
        assert mllm.answer_logits(mllm.batch(requests)).isfinite().all()
    assert again.network(mllm).adapter.paths


@pytest.mark.parametrize("name", MODELS)
def test_every_loss_is_finite_and_reaches_every_parameter(name):
    mllm, maker = tiny(name), Serac(OPTIONS)
    before, network = bits(mllm.model), begun(mllm)
    for left in network.adapter.left:
        left.data = 0.1 * drawn(left.shape, 3)  # zero at the start, where R has no gradient
    batch = [*records(0, 2), EditRecord(EditRequest(words(1, 2), "w44"))]  # one without images
    losses = maker.losses(mllm, network, batch, torch.Generator())
    assert set(losses) == {
        "scope", "edit", "text_generality", "image_generality", "text_locality", "image_locality"
    }  # fmt: skip
    sum(losses.values()).backward()
    for parameter in network.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0
    assert same_bits(mllm.model, before)
    assert not any(p.requires_grad or p.grad is not None for p in mllm.model.parameters())


def test_the_counterfactual_model_learns_to_say_the_target():
    mllm, maker = tiny("llava"), Serac(replace(OPTIONS, rank=8, locality=0.0))
    network = begun(mllm, maker.settings)

    def lost():
        with torch.no_grad():
            losses = maker.losses(mllm, network.eval(), HELD, torch.Generator())
        assert set(losses) == {"scope", "edit", "text_generality", "image_generality"}
        return float(losses["text_generality"])

    network.scope.observe(features_of(mllm, [record.request for record in HELD]))
    before = lost()
    optimiser = torch.optim.AdamW(network.adapter.parameters(), lr=3e-2)
    for step in range(12):
        losses = maker.losses(mllm, network.train(), records(6 * (step % 3), 6), torch.Generator())
        optimiser.zero_grad()
        losses["edit"].backward()
        optimiser.step()
    assert lost() < before - 0.3


@pytest.mark.parametrize("name", MODELS)
def test_the_scope_is_trained_without_answers(name):
    mllm, network = tiny(name), begun(tiny(name))
    batch = records(0, 3)

    def answered(record):
        changed = {
            kind: tuple(replace(p, answer="w58") for p in getattr(record, kind))
            for kind in ("text_generality", "image_generality", "text_locality", "image_locality")
        }
        return replace(record, request=replace(record.request, target="w57"), **changed)

    network.scope.observe(features_of(mllm, [r.request for r in batch]))
    scope = network.scope.eval()
    found = [
        scope_loss(mllm, scope, given, read).item()
        for read in ("question", "reference")
        for given in (batch, [answered(r) for r in batch])
    ]
    assert found[0] == found[1]
    assert found[2] != found[3]
    assert question_text("w3", "w4") == "w3"


def test_what_is_one_edit_is_not_out_of_its_scope():
    """Captions: one question for all, so that only the image tells edits apart."""
    mllm = tiny("llava")
    scope = TrainedScope(32, 8, torch.Generator().manual_seed(0)).train()
    twice = [EditRecord(EditRequest("w5 w6", "w44", look(i // 2)), id=str(i)) for i in range(4)]
    found = scope_loss(mllm, scope, twice)
    scope.eval()
    cached = features_of(mllm, [record.request for record in twice])
    apart = -scope(cached, cached)
    pairs = apart[0, 2:], apart[1, 2:], apart[2, :2], apart[3, :2]
    out = -torch.log(-torch.expm1(-torch.cat(pairs)))
    # What is one edit is at no distance from itself, and counts neither as in scope nor as out.
    torch.testing.assert_close(found, out.mean(), rtol=1e-4, atol=1e-5)


def test_kinds_of_questions_count_alike():
    """Other words, other images, near and far, each by its mean; written out for two records."""
    mllm = tiny("llava")
    scope = TrainedScope(32, 8, torch.Generator().manual_seed(0)).train()
    two = records(0, 2)
    found = scope_loss(mllm, scope, two)
    scope.eval()
    cached = features_of(mllm, [record.request for record in two])

    def apart(probes):
        return -scope(features_of(mllm, probes), cached)

    def of(kind):
        return apart([getattr(record, kind)[0] for record in two])

    worded, seen, text, image = map(of, (*CHANGED[1:], *KEPT))
    crossed = apart(
        [Probe(one.request.question, "", other.request.image) for one, other in (two, two[::-1])]
    )
    own = apart([record.request for record in two])
    near = torch.cat([text.diagonal(), image.diagonal()])
    far = [worded, seen, text, image, own]
    other = torch.cat([*(m[[0, 1], [1, 0]] for m in far), crossed.flatten()])
    inside = (worded.diagonal().mean() + seen.diagonal().mean()) / 2
    lost = [-torch.log(-torch.expm1(-one)).mean() for one in (near, other)]
    torch.testing.assert_close(found, (inside + sum(lost) / 2) / 2, rtol=1e-4, atol=1e-5)


def test_scope_and_counterfactual_model_learn_at_rates_of_their_own():
    mllm, maker = tiny("llava"), Serac(replace(OPTIONS, scope_lr=3e-5))
    network = begun(mllm, maker.settings)
    scope, rest = maker.groups(network)
    assert scope["lr"] == 3e-5
    assert "lr" not in rest
    grouped = [*scope["params"], *rest["params"]]
    assert [*map(id, grouped)] == [*map(id, network.parameters())]
    alone = Serac(SeracOptions(rank=0))
    (only,) = alone.groups(begun(mllm, alone.settings))
    assert len(only["params"]) == len(scope["params"])


def features(words, image=None):
    seen = image is not None
    width = len(words)
    return Features(
        torch.tensor([words]).float(),
        torch.tensor([image if seen else [0.0] * width]).float(),
        torch.tensor([seen]),
    )


def fitted():
    scope = TrainedScope(2, 3, torch.Generator().manual_seed(1))
    scope.words.statistics.update(drawn((20, 2), 0))
    scope.image.statistics.update(drawn((20, 2), 1))
    for part in (scope.words, scope.image):
        part.weight.data *= 4  # as after a training, which draws apart what is unlike
    return scope.eval()


@pytest.mark.parametrize("scope", [fitted(), FixedScope(0.9, 0.9)], ids=["trained", "fixed"])
@torch.no_grad()
def test_words_and_image_must_both_be_near(scope):
    edit, bare = features([1.0, 2.0], [2.0, 1.0]), features([1.0, 2.0])
    share = lambda asked, known=edit: float(scope(asked, known).exp())  # noqa: E731
    assert share(edit) == pytest.approx(1)
    assert share(bare, bare) == pytest.approx(1)
    caption = features([0.0, 0.0], [2.0, 1.0])  # no words: the image decides
    assert share(caption, caption) == pytest.approx(1)
    for asked in (features([-9.0, 9.0], [2.0, 1.0]), features([1.0, 2.0], [-9.0, 9.0])):
        assert share(asked) < 0.1
    assert share(bare) < 0.5  # an edit about an image, a question without one


def test_the_fixed_scope_is_a_budget_of_two_cosines():
    scope = FixedScope(0.8, 0.5)
    edit = features([1.0, 0.0], [1.0, 0.0])

    def turned(cosine):
        return [cosine, (1 - cosine**2) ** 0.5]

    for words_cosine, image_cosine in ((0.8, 1.0), (1.0, 0.5), (0.9, 0.75)):
        found = scope(features(turned(words_cosine), turned(image_cosine)), edit)
        assert found.exp().item() == pytest.approx(0.5, abs=1e-5)
    about_words = features([1.0, 0.0])
    assert scope(features([1.0, 0.0], [0.0, 1.0]), about_words).exp().item() > 0.9
    assert scope(about_words, edit).item() == pytest.approx(-APART)


@pytest.mark.parametrize("alone", ["question", "edit"])
def test_an_image_that_is_missing_is_a_learned_distance(alone):
    scope = fitted()
    seen, bare = features([1.0, 2.0], [2.0, 1.0]), features([1.0, 2.0])
    asked, known = (seen, bare) if alone == "question" else (bare, seen)
    found = scope(asked, known)
    number = 0 if alone == "question" else 1
    want = -torch.nn.functional.softplus(scope.alone[number])
    torch.testing.assert_close(found[0, 0], want)
    (gradient,) = torch.autograd.grad(found.sum(), scope.alone)
    assert gradient[number] < 0
    assert gradient[1 - number] == 0
