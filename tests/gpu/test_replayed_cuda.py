"""Steps that are recorded and replayed: the numbers of plain ones, and what cannot be recorded."""

from typing import ClassVar

import pytest
import torch

from editing.methods import finetune
from editing.methods.base import editor
from mmtune.replayed import Steps
from tests.editing.test_finetune import options
from tests.editing.tiny import PROBES, REQUEST, SECOND, bits, same_bits, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)


class Watched(Steps):
    """Says whether the loop ended with recordings."""

    ended: ClassVar[list[bool]] = []

    def __exit__(self, *error):
        self.ended.append(self.replays)
        super().__exit__(*error)


@pytest.fixture
def ended(monkeypatch):
    monkeypatch.setattr(finetune, "Steps", Watched)
    monkeypatch.setattr(Watched, "ended", [])
    return Watched.ended


def made(mllm, kind, asked, replays, **settings):
    own = editor(kind, options(kind, **settings))
    own.replays = replays
    return own.edit(mllm, asked)


@pytest.mark.parametrize("asked", [[REQUEST], [REQUEST, SECOND]])
@pytest.mark.parametrize("kind", ["ft", "ft-l", "lora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["llava", "blip2-opt", "qwen2"])
def test_replayed_steps_are_plain_ones_to_the_bit(name, dtype, kind, asked, ended):
    mllm = tiny(name, dtype)
    mllm.model.cuda()
    before = bits(mllm.model)
    settings = {"steps": 9, "lr": 1e-3, "batch_size": 1, "region": "language"}
    edits = [made(mllm, kind, asked, replays, **settings) for replays in (False, True)]
    assert ended == [False, True]
    assert edits[0].about == edits[1].about
    for name, change in edits[0].changes.items():
        for part, tensor in change.tensors().items():
            assert torch.equal(edits[1].changes[name].tensors()[part], tensor)
    assert same_bits(mllm.model, before)


def test_a_replayed_edit_stops_when_the_target_is_written(ended):
    mllm = tiny("llava", torch.bfloat16)
    mllm.model.cuda()
    edits = [made(mllm, "ft", [REQUEST], r, steps=150, lr=2e-3) for r in (False, True)]
    assert ended == [False, True]
    assert 3 < edits[1].about["steps"] < 150
    assert edits[0].about == edits[1].about
    with edits[1].applied(mllm):
        assert mllm.answer([REQUEST]) == [REQUEST.target]


def test_an_error_in_a_replayed_edit_leaves_the_model_as_it_was(monkeypatch):
    mllm = tiny("llava", torch.bfloat16)
    mllm.model.cuda()
    before, said, passes = bits(mllm.model), mllm.answer(PROBES), []

    class Failing(Steps):
        def update(self):
            super().update()
            passes.append(self.replays)
            if len(passes) == 5:
                raise KeyError

    monkeypatch.setattr(finetune, "Steps", Failing)
    with pytest.raises(KeyError):
        made(mllm, "ft", [REQUEST], True, steps=9, lr=1e-3)
    assert passes == [False, False, True, True, True]
    assert same_bits(mllm.model, before)
    assert mllm.answer(PROBES) == said


def descent(ask, replays, count=8):
    """Numbers of AdamW on a sum whose pass asks the device for something."""
    weight = torch.linspace(-1, 1, 40, device=CUDA).requires_grad_()
    optimiser = torch.optim.AdamW([weight], lr=0.1, fused=True, capturable=True)

    def gradients():
        optimiser.zero_grad()
        loss = ask(weight).square().sum()
        loss.backward()
        return loss.detach()[None]

    found = []
    with Steps(gradients, optimiser.step, CUDA, replays) as steps:
        for _ in range(count):
            found += steps.gradients()
            steps.update()
        return found, steps.replays


@pytest.mark.parametrize(
    ("ask", "replays"),
    [
        (lambda w: w * int((w.detach() < 9).sum()), True),  # always 40
        (lambda w: w * int((w.detach() > 0.5).sum()), False),  # fewer and fewer
        (lambda w: w[w.detach() > -2], False),  # of a shape that only the device knows
        (lambda w: w * torch.tensor(2.0, device=CUDA), True),  # kept on the device
        (lambda w: torch.where(w.detach() > 0, w, 0.5), True),  # so is this scalar
        (lambda w: w * torch.tensor(2.0).to(CUDA), False),  # sent from the host
        (lambda w: w.masked_scatter(w.detach() > 0, w * 2), True),  # its gradient asks for a size
    ],
)
def test_what_is_asked_in_a_pass_is_still_true_in_a_replay(ask, replays):
    wanted, plain = descent(ask, False)
    found, replayed = descent(ask, True)
    assert (plain, replayed) == (False, replays)
    assert found == wanted
    assert torch.cuda.get_sync_debug_mode() == 0
    torch.randn(3, device=CUDA)  # a recording that fails would leave the generator unusable


def test_an_update_that_asks_is_plain():
    def gradients():
        weight.grad = weight.detach() * 2
        return weight.detach().clone()

    def update():
        weight.sub_(weight.grad * float(weight.abs()))

    found = []
    for replays in (False, True):
        weight = torch.tensor([0.25], device=CUDA)
        with Steps(gradients, update, CUDA, replays) as steps:
            for _ in range(6):
                found += steps.gradients()
                steps.update()
            assert steps.replays is replays
    assert found[:6] == found[6:]


def test_loops_take_over_the_memory_of_those_before_them():
    mllm = tiny("llava", torch.bfloat16)
    mllm.model.cuda()
    reserved = []
    for _ in range(6):
        made(mllm, "ft", [REQUEST], True, steps=6, lr=1e-3)
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[1]
