"""KE: the gate's formula without a dense gradient, what it is told of an edit, meta-gradients."""

from __future__ import annotations

import pytest
import torch

from editing.edits import load
from editing.meta.config import MetaTrainingOptions
from editing.meta.gradients import gradient_rows
from editing.meta.losses import LossWeights
from editing.meta.training import train_editor
from editing.methods.base import editors
from editing.methods.ke import Encoder, Gate, Ke, KeOptions, Read
from editing.regions import Region
from editing.requests import EditRequest
from tests.editing.meta_gradients import assert_meta_gradients
from tests.editing.meta_records import random_records
from tests.editing.tiny import MODELS, REQUEST, SECOND, bits, drawn, picture, same_bits, tiny

SMALL = {"encoder": 8, "condition": 16, "hidden": 12}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def fresh(mllm, seed=0, **options):
    made = Ke(KeOptions(**{**SMALL, **options}))
    return made, made.begin(mllm, seeded(seed))


def test_the_gate_is_the_formula_of_the_paper():
    """sigmoid(eta) * (gradient * softmax(a) g^T + softmax(b) e^T), gradient and product dense."""
    torch.manual_seed(0)
    gate = Gate((7, 5), KeOptions(**SMALL, scale=0.5))
    condition, x, delta = drawn((16,), 0), drawn((4, 5), 1), drawn((4, 7), 2)
    a, g, b, e, eta = gate.layers(condition).split([7, 5, 7, 5, 1])
    gradient = delta.T @ x
    mask = a.softmax(0)[:, None] * g
    want = 0.5 * eta.sigmoid() * (gradient * mask + b.softmax(0)[:, None] * e)
    change = gate(condition, x, delta)
    assert change.left.shape == (7, 5)  # four tokens and the added matrix
    torch.testing.assert_close(change.dense(), want)


def test_it_can_start_as_a_step_down_the_gradient():
    mllm = tiny("llava")
    ke, network = fresh(mllm, scale=50.0, start=0.3)
    edit = ke.edit_with(mllm, network.eval(), [REQUEST], seeded())
    for name, (x, delta) in gradient_rows(mllm, ke.weights(mllm), [REQUEST]).items():
        torch.testing.assert_close(edit.changes[name].dense(), -0.3 * delta.T @ x)
    # Every part of the gate can be learnt from there; b as soon as there is an e.
    losses = ke.losses(mllm, network, random_records(1), seeded())
    sum(losses.values()).backward()
    for gate in network.gates:
        lengths = gate.layers[-1].parametrizations.weight.original0
        moved = [float(part.abs().max()) > 0 for part in lengths.grad.split(gate.sizes)]
        assert moved == [True, True, False, True, True]


@pytest.mark.parametrize("region", ["vision", "language"])
@pytest.mark.parametrize("name", MODELS)
def test_an_edit_is_gated_gradient_and_leaves_no_trace(name, region, tmp_path):
    mllm = tiny(name)
    before = bits(mllm.model)
    ke, network = fresh(mllm, region=region)
    edit = ke.edit_with(mllm, network.eval(), [REQUEST], seeded())
    weights = dict(ke.weights(mllm))
    assert list(edit.changes) == list(weights)
    rows = gradient_rows(mllm, weights, [REQUEST])
    for weight, change in edit.changes.items():
        assert change.left.shape == (weights[weight].shape[0], len(rows[weight][0]) + 1)
        assert torch.linalg.matrix_norm(change.dense()) > 0
    batch = mllm.batch([REQUEST])
    said = mllm.answer_logits(batch)
    with edit.applied(mllm):
        inside = mllm.answer_logits(batch)
        assert not torch.equal(inside, said)
    assert same_bits(mllm.model, before)
    edit.save(tmp_path / "edit")
    with load(tmp_path / "edit").applied(mllm):
        assert torch.equal(mllm.answer_logits(batch), inside)
    assert same_bits(mllm.model, before)


def test_the_edit_depends_on_question_target_and_image():
    mllm = tiny("llava")
    ke, network = fresh(mllm)
    conditions = []
    hook = network.encoder.register_forward_hook(lambda *call: conditions.append(call[-1]))
    question, image = REQUEST.question, REQUEST.image
    for asked in (
        REQUEST,
        EditRequest("w5 w9 w8 w7", REQUEST.target, image),
        EditRequest(question, "w40 w42", image),
        EditRequest(question, REQUEST.target, picture(9)),
        EditRequest(question, REQUEST.target, image, id="other"),
    ):
        ke.edit_with(mllm, network, [asked], seeded())
    hook.remove()
    same = [torch.equal(conditions[0], other) for other in conditions[1:]]
    assert same == [False, False, False, True]


def test_the_encoder_tells_questions_from_targets():
    torch.manual_seed(1)
    encoder = Encoder(6, KeOptions(**SMALL))
    words, image = drawn((5, 6), 0), torch.zeros(6)
    assert torch.equal(encoder(Read(words, 3, image)), encoder(Read(words, 2, image)))
    encoder.target.data.normal_()
    assert not torch.allclose(encoder(Read(words, 3, image)), encoder(Read(words, 2, image)))
    assert encoder(Read(words, 5, image)).shape == (16,)


def test_several_requests_add_up():
    mllm = tiny("blip2-opt")
    ke, network = fresh(mllm)
    asked = [REQUEST, SECOND, EditRequest("w10 w11 w12", "w43 w44")]
    whole = ke.edit_with(mllm, network.eval(), asked, seeded())
    alone = [ke.edit_with(mllm, network, [one], seeded()) for one in asked]
    for name, change in whole.changes.items():
        total = sum(edit.changes[name].dense() for edit in alone)
        torch.testing.assert_close(change.dense(), total, rtol=1e-4, atol=1e-8)


def test_the_draw_is_the_generators_alone():
    mllm = tiny("llava")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (fresh(mllm, seed)[1].state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.words.weight"], other["encoder.words.weight"])


LAST = Region(("language",), ("fc2",), "last:1")


@pytest.mark.parametrize(("name", "region"), [("llava", "vision"), ("blip2-opt", LAST)])
def test_meta_gradients_are_those_of_finite_differences(name, region):
    mllm = tiny(name, torch.float64)
    ke, network = fresh(mllm, region=region, scale=20.0, encoder=3, condition=4, hidden=3)
    assert_meta_gradients(ke, mllm, network)


def test_training_makes_targets_likelier_and_it_goes_through_a_folder(tmp_path):
    mllm, records = tiny("llava"), random_records(2)
    ke = Ke(KeOptions(**SMALL, scale=20.0, losses=LossWeights(1, 1, 1, 1, 1)))
    losses = []
    for steps in (1, 25):
        options = MetaTrainingOptions(
            steps=steps, accumulation=1, lr=5e-2, validate_every=steps, patience=0, save_every=0
        )
        folder = tmp_path / str(steps)
        losses.append(train_editor(ke, mllm, records, records, options, folder, progress=False))
    before, after = (found.validation for found in losses)
    for kind in ("edit", "text_generality", "image_generality"):
        assert after[kind] < before[kind] - 0.2
    assert max(after["text_locality"], after["image_locality"]) < 0.05
    used = Ke(KeOptions(trained=str(tmp_path / "25" / "trained")))
    assert (used.settings.scale, used.settings.hidden) == (20.0, 12)
    request = records[0].request
    batch = mllm.batch([request])
    unedited = float(mllm.nll(batch))
    with used.edit(mllm, [request]).applied(mllm):
        assert float(mllm.nll(batch)) < unedited - 0.2


def test_it_is_found_by_name():
    assert editors()["ke"] is Ke
