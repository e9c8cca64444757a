"""MEND: gradient descent at the start, meta-gradients, and what training brings."""

from __future__ import annotations

import pytest
import torch

from editing.changes import LowRank
from editing.edits import load
from editing.meta.config import MetaTrainingOptions
from editing.meta.gradients import gradient_rows
from editing.meta.losses import LossWeights
from editing.meta.training import train_editor
from editing.methods.base import editor, editors
from editing.methods.mend import Mend, MendOptions
from editing.regions import Region, parameters_of
from editing.requests import EditRequest
from mmtune.backbones.base import SiteError
from tests.editing.meta_gradients import assert_meta_gradients
from tests.editing.meta_records import random_records
from tests.editing.tiny import MODELS, PROBES, REQUEST, SECOND, bits, same_bits, tiny

REGIONS = ("vision", "language")
SIGNS = ("descent", "reference")
BOTH = [REQUEST, SECOND]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def fresh(mllm, **options):
    made = Mend(MendOptions(**{"rank": 8, **options}))
    return made, made.begin(mllm, seeded())


def nll(mllm, weights=None):
    return float(mllm.nll(mllm.batch([REQUEST]), weights).mean())


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("name", MODELS)
def test_untrained_and_without_normaliser_it_is_a_step_along_the_gradient(name, region):
    mllm = tiny(name)
    weights = parameters_of(mllm.backbone, region)
    for weight in weights.values():
        weight.requires_grad_()
    sum(mllm.nll(mllm.batch([r])).sum() for r in BOTH).backward()
    for weight in weights.values():
        weight.requires_grad_(False)
    before, losses = nll(mllm), {}
    for sign in SIGNS:
        mend, network = fresh(mllm, region=region, normalise=False, rate=1e-2, sign=sign)
        edit = mend.edit_with(mllm, network.eval(), BOTH, seeded())
        assert list(edit.changes) == list(weights)
        for weight_name, change in edit.changes.items():
            step = {"descent": -1e-2, "reference": 1e-2}[sign] * weights[weight_name].grad
            assert isinstance(change, LowRank)
            torch.testing.assert_close(change.dense(), step, rtol=1e-4, atol=1e-8)
        with edit.applied(mllm):
            losses[sign] = nll(mllm)
    assert losses["descent"] < before < losses["reference"]


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("name", MODELS)
def test_meta_gradients_are_those_of_finite_differences(name, region):
    mllm = tiny(name, torch.float64)
    mend, network = fresh(mllm, region=region, rate=1e-3)
    assert_meta_gradients(mend, mllm, network, rates=("rates",))


def test_several_requests_add_up():
    mllm = tiny("llava")
    mend, network = fresh(mllm)
    mend.losses(mllm, network.train(), random_records(3), seeded())  # statistics
    asked = [*BOTH, EditRequest("w10 w11 w12", "w43 w44")]  # with and without an image
    whole = mend.edit_with(mllm, network.eval(), asked, seeded())
    alone = [mend.edit_with(mllm, network, [one], seeded()) for one in asked]
    for name, change in whole.changes.items():
        parts = [edit.changes[name] for edit in alone]
        assert change.left.shape[1] == sum(part.left.shape[1] for part in parts)
        total = sum(part.dense() for part in parts)
        torch.testing.assert_close(change.dense(), total, rtol=1e-4, atol=1e-8)


def test_rows_are_those_of_answer_tokens_in_the_last_layer():
    """Above the last attention, the loss of an answer reaches the tokens that predict it alone."""
    mllm = tiny("llava")
    weights = parameters_of(mllm.backbone, "language")
    rows = gradient_rows(mllm, weights, [REQUEST])
    last = [x for name, (x, _) in rows.items() if "layers.1" in name]
    assert [len(x) for x in last] == [3, 3]  # two words and the end
    first = [x for name, (x, _) in rows.items() if "layers.0" in name]
    assert all(len(x) > 3 for x in first)


def test_only_training_moves_the_statistics():
    mllm, records = tiny("llava"), random_records(2)
    mend, network = fresh(mllm)
    mend.losses(mllm, network.train(), records, seeded())
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    assert all(int(t) > 0 for name, t in before.items() if name.endswith("count"))
    with torch.no_grad():
        mend.losses(mllm, network.eval(), records, seeded())
    mend.edit_with(mllm, network, BOTH, seeded())
    assert all(torch.equal(t, before[name]) for name, t in network.named_buffers())
    mend.losses(mllm, network.train(), records, seeded())
    assert not any(torch.equal(t, before[name]) for name, t in network.named_buffers())


def test_losses_that_count_nothing_are_left_out():
    mllm, records = tiny("llava"), random_records(2)
    mend, network = fresh(mllm)
    every = mend.losses(mllm, network, records, seeded())
    counts = LossWeights(edit=0, image_generality=0.5, text_locality=0)
    some = Mend(MendOptions(rank=8, losses=counts)).losses(mllm, network.eval(), records, seeded())
    again = mend.losses(mllm, network, records, seeded())
    assert set(some) == set(every) - {"edit", "text_locality"}
    torch.testing.assert_close(some["image_generality"], 5 * again["image_generality"])
    torch.testing.assert_close(some["image_locality"], again["image_locality"])


def test_bf16_models_have_a_network_in_float32():
    mllm = tiny("llava", torch.bfloat16)
    mend, network = fresh(mllm, rate=1e-2)
    losses = mend.losses(mllm, network.train(), random_records(2), seeded())
    sum(losses.values()).backward()
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())
    edit = mend.edit_with(mllm, network.eval(), [REQUEST], seeded())
    assert all(c.left.dtype == c.right.dtype == torch.float32 for c in edit.changes.values())
    before = bits(mllm.model)
    with edit.applied(mllm):
        assert not same_bits(mllm.model, before)
    assert same_bits(mllm.model, before)


TRAIN, VAL = random_records(4), random_records(2, seed=5)
OPTIONS = MetaTrainingOptions(
    steps=40, batch_size=1, accumulation=2, lr=1e-3, validate_every=20, patience=0, save_every=0
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(model, folder, numbers before, numbers after) of a MEND trained on its own validation."""
    folder, mllm = tmp_path_factory.mktemp("mend"), tiny("llava")
    mend = Mend(MendOptions(rank=16, rate=0.1, rate_lr=1e-3))
    first = MetaTrainingOptions(**{**vars(OPTIONS), "steps": 1})
    before = train_editor(mend, mllm, TRAIN, TRAIN, first, folder / "first", progress=False)
    after = train_editor(mend, mllm, TRAIN, TRAIN, OPTIONS, folder, progress=False)
    return mllm, folder / "trained", before.validation, after.validation


def test_training_makes_edits_take_and_stay_where_they_belong(trained):
    _, _, before, after = trained
    assert before["success"] <= 0.5
    assert after["success"] == 1.0
    for kind in ("edit", "text_generality", "image_generality"):
        assert after[kind] < 0.95 * before[kind]
    for kind in ("text_locality", "image_locality"):
        assert after[kind] < 0.7 * before[kind]


def test_a_trained_editor_edits_and_its_edit_goes_through_a_file(trained, tmp_path):
    mllm, folder, *_ = trained
    mend = editor("mend", MendOptions(trained=str(folder)))
    assert mend.settings.rank == 16
    before, said = bits(mllm.model), mllm.answer(PROBES)
    request = TRAIN[0].request
    asked_otherwise = mllm.batch(TRAIN[0].text_generality + TRAIN[0].image_generality)
    unlikely = mllm.nll(asked_otherwise)
    edit = mend.edit(mllm, [request])
    assert same_bits(mllm.model, before)
    assert mllm.answer([request]) != [request.target]
    with edit.applied(mllm):
        assert mllm.answer([request]) == [request.target]
        assert (mllm.nll(asked_otherwise) < unlikely - 0.5).all()
        inside = bits(mllm.model)
    assert same_bits(mllm.model, before)
    assert mllm.answer(PROBES) == said
    edit.save(tmp_path / "edit")
    with load(tmp_path / "edit").applied(mllm):
        assert same_bits(mllm.model, inside)
    assert edit.about["editor"] == "mend"
    assert edit.about["settings"]["trained"] == str(folder)


def test_a_network_read_twice_has_the_same_bits(trained):
    mllm, folder, *_ = trained
    options = MendOptions(trained=str(folder))
    first, second = (Mend(options).network(mllm).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    statistics = [name for name in first if name.endswith("squares")]
    assert all(first[name].dtype == torch.float64 for name in statistics)


def test_sequential_edits_are_one_edit(trained):
    mllm, folder, *_ = trained
    mend = Mend(MendOptions(trained=str(folder)))
    one, two = (record.request for record in TRAIN[:2])
    edit = mend.edit(mllm, [one])
    with edit.applied(mllm):
        second = mend.edit(mllm, [two])
        with second.applied(mllm):
            want = mllm.answer_logits(mllm.batch([one, two]))
    both = mend.extend(mllm, edit, [two])
    assert type(both) is type(edit)
    assert [r["id"] for r in both.about["requests"]] == [one.id, two.id]
    with both.applied(mllm):
        found = mllm.answer_logits(mllm.batch([one, two]))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_edited():
    mllm = tiny("llava")
    bare = EditRequest("w10 w11", "w43")
    mend, network = fresh(mllm, region="vision")
    with pytest.raises(ValueError, match=r"linear_1.weight takes no part.*no image.*language"):
        mend.edit_with(mllm, network, [bare], seeded())
    patches = Region(("vision",), ("embed",))
    with pytest.raises(SiteError, match=r"weights of Linears, and .*patch_embedding.* of a Conv2d"):
        fresh(mllm, region=patches)
    biases = Region(("language",), ("fc2",), biases=True)
    with pytest.raises(SiteError, match=r"bias is a parameter of a Linear.*without biases"):
        fresh(tiny("blip2-opt"), region=biases)
    with pytest.raises(ValueError, match="at least one loss"):
        LossWeights(0, 0, 0, 0, 0)


def test_it_is_found_by_name():
    assert editors()["mend"] is Mend
