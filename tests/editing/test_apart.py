"""Records that are edited apart in one pass: what each would lose if it were edited alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from editing.changes import LowRank
from editing.meta.apart import each_changed
from editing.meta.config import MetaTrainingOptions
from editing.meta.gradients import each_gradient_rows, gradient_rows
from editing.meta.training import train_editor
from editing.methods.ke import Ke, KeOptions
from editing.methods.mend import Mend, MendOptions
from editing.requests import EditRecord, EditRequest
from mmtune.backbones.base import SiteError
from tests.editing.meta_records import random_records
from tests.editing.tiny import BARE, MODELS, OTHER, REQUEST, SEEN, bits, drawn, same_bits, tiny

EVERY = pytest.mark.parametrize("name", MODELS)
SMALL = {"encoder": 8, "condition": 16, "hidden": 12, "scale": 20.0}
EDITORS = {"mend": (Mend, MendOptions(rank=4, rate=0.1)), "ke": (Ke, KeOptions(**SMALL))}
RECORDS = [
    *random_records(3),
    EditRecord(EditRequest("w7 w9", "w44", id="bare")),  # no image, nothing to keep
]


def begun(kind, mllm):
    """(editor of records apart, of one edit, a network that is no identity, in eval mode)."""
    maker, options = EDITORS[kind]
    apart, joint = maker(replace(options, apart=True)), maker(options)
    network = apart.begin(mllm, torch.Generator().manual_seed(0)).train()
    joint.losses(mllm, network, RECORDS[:2], torch.Generator())  # fills running statistics
    with torch.no_grad():
        for number, value in enumerate(network.parameters()):
            value += 0.02 * drawn(value.shape, number)
    return apart, joint, network.eval()


@pytest.mark.parametrize("kind", EDITORS)
@EVERY
def test_losses_and_their_gradients_are_those_of_each_record_alone(name, kind):
    mllm = tiny(name)
    apart, joint, network = begun(kind, mllm)
    before = bits(mllm.model)
    found = apart.losses(mllm, network, RECORDS, torch.Generator())
    alone = [joint.losses(mllm, network, [record], torch.Generator()) for record in RECORDS]
    for key, value in found.items():
        same = [losses[key] for losses in alone if key in losses]
        torch.testing.assert_close(value, torch.stack(same).mean(), rtol=1e-3, atol=1e-5)
    parameters = [*network.parameters()]
    mine = torch.autograd.grad(sum(found.values()), parameters)
    means = [torch.stack([one[key] for one in alone if key in one]).mean() for key in found]
    for got, want in zip(mine, torch.autograd.grad(sum(means), parameters), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-4 * float(want.abs().max()) + 1e-7)
    assert len({value.item() for value in found.values()}) == len(found) == 5
    assert same_bits(mllm.model, before)
    assert not mllm.hooked


@EVERY
def test_rows_of_each_request_are_those_that_it_has_alone(name):
    mllm, editor = tiny(name), Mend(MendOptions())
    weights = editor.weights(mllm)
    requests = [record.request for record in RECORDS]
    every = each_gradient_rows(mllm, weights, requests)
    for request, rows in zip(requests, every, strict=True):
        for weight, (x, delta) in gradient_rows(mllm, weights, [request]).items():
            want = delta.T @ x
            mine = rows[weight][1].T @ rows[weight][0]
            torch.testing.assert_close(mine, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))


@EVERY
def test_each_row_is_computed_with_its_own_change(name):
    mllm = tiny(name)
    weights = Mend(MendOptions()).weights(mllm)
    changes = [
        {
            n: LowRank(drawn((w.shape[0], rank), rank), drawn((rank, w.shape[1]), 7 + rank))
            for n, w in weights.items()
        }
        for rank in (1, 2, 3)
    ]
    probes = [SEEN, OTHER, OTHER]
    said = mllm.batch(probes).target_mask == 1
    with each_changed(mllm.model, changes, [1, 0, 2]):  # the second is for no row
        found = mllm.answer_logits(mllm.batch(probes))
    for rows, change in ([0], changes[0]), ([1, 2], changes[2]):
        edited = {n: c.on(weights[n]) for n, c in change.items()}
        want = mllm.answer_logits(mllm.batch(probes), edited)
        mine, theirs = (scores[rows][said[rows]] for scores in (found, want))
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, mllm.answer_logits(mllm.batch(probes)))


def test_regions_that_read_images_are_refused():
    mllm = tiny("llava")
    editor = Mend(MendOptions(region="vision", apart=True))
    with pytest.raises(SiteError, match="this region is in projector: choose region: language"):
        editor.losses(mllm, torch.nn.Identity(), RECORDS[:1], torch.Generator())


@pytest.mark.parametrize("kind", EDITORS)
def test_successes_are_those_of_each_alone(kind):
    mllm = tiny("llava")
    apart, joint, network = begun(kind, mllm)
    (answer,) = mllm.answer([REQUEST])
    known = EditRecord(replace(REQUEST, target=answer))
    bare = EditRecord(EditRequest(BARE.question, mllm.answer([BARE])[0]))
    records = [known, bare, *RECORDS]
    generator = torch.Generator()
    alone = [joint.successes(mllm, network, [record], generator) for record in records]
    assert apart.successes(mllm, network, records, generator) == sum(alone)


def test_a_training_apart_makes_targets_likelier_and_ends_by_the_clock(tmp_path):
    mllm, records = tiny("llava"), random_records(4)
    editor = Mend(MendOptions(rank=4, rate=1.0, rate_lr=1e-2, apart=True))
    options = MetaTrainingOptions(
        steps=10_000, batch_size=4, accumulation=1, lr=1e-3, validate_every=10, patience=0,
        save_every=0, seconds=4.0,
    )  # fmt: skip
    found = train_editor(editor, mllm, records, records, options, tmp_path, progress=False)
    assert 10 < found.steps < 10_000
    assert not found.stopped_early
    assert 4 <= found.seconds < 30
    again = Mend(MendOptions(trained=str(tmp_path / "trained")))
    batch = mllm.batch([records[0].request])
    unedited = float(mllm.nll(batch))
    with again.edit(mllm, [records[0].request]).applied(mllm):
        assert float(mllm.nll(batch)) < unedited - 0.2
