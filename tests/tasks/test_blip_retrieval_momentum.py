"""The momentum encoder, its queue, and the contrastive loss that they teach."""

from __future__ import annotations

from collections import deque
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from mmtune.tasks.losses import Gathered, clip_loss
from mmtune.tasks.momentum import (
    Bank,
    FeatureQueue,
    Momentum,
    MomentumEncoder,
    distilled_clip_loss,
)


def unit(count, seed, width=6):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator), dim=1)


def bank_of(groups, seed):
    return Bank(unit(len(groups), seed), unit(len(groups), seed + 1), torch.tensor(groups))


def by_hand(own, teacher, bank, temperature, alpha):
    """The loss pair by pair, in float64."""
    total = own.image.new_zeros((), dtype=torch.float64)
    n = len(own.groups)
    for x, taught, others in (
        (own.image, teacher.image, bank.text),
        (own.text, teacher.text, bank.image),
    ):
        for i in range(n):
            logs = (others.double() @ x[i].double() / temperature).log_softmax(0)
            soft = (others.double() @ taught[i].double() / temperature).softmax(0)
            pairs = zip(own.groups[i].expand_as(bank.groups), bank.groups, strict=True)
            right = [bool((a == b).any()) for a, b in pairs]
            for j, hit in enumerate(right):
                target = alpha * soft[j] + (1 - alpha) * hit / sum(right)
                total = total - target * logs[j] / (2 * n)
    return total


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_contrastive_loss_and_its_gradient_are_those_of_the_double_sum(alpha):
    own = bank_of([[0, 0], [1, 1], [2, 1], [3, 3]], 1)
    teacher = Bank(unit(4, 8), unit(4, 9), own.groups)
    kept = bank_of([[1, 9], [7, 3], [8, 8]], 20)  # same image as the second; text as the fourth
    queue = FeatureQueue(5)
    queue.push(kept)
    bank = queue.after(teacher)
    assert len(bank.groups) == 7
    for x in (own.image, own.text):
        x.requires_grad_()
    found = distilled_clip_loss(own, teacher, bank, 0.07, alpha, Gathered(4, torch.device("cpu")))
    want = by_hand(own, teacher, bank, 0.07, alpha)
    assert found.item() == pytest.approx(want.item(), rel=1e-6)
    got = torch.autograd.grad(found, (own.image, own.text))
    expected = torch.autograd.grad(want, (own.image, own.text))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert other.abs().max() > 0.1


def test_without_distillation_and_queue_it_is_clips_loss():
    own = bank_of([[0, 0], [1, 1], [2, 2]], 3)
    found = distilled_clip_loss(own, own, own, 0.1, 0.0, Gathered(3, torch.device("cpu")))
    torch.testing.assert_close(found, clip_loss(own.image, own.text, torch.tensor(10.0)))


def test_average_after_n_steps_is_the_sum_of_decay_powers():
    decay, steps = 0.9, 12
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    values = torch.randn(steps + 1, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    parameter.data.copy_(values[0])
    encoder = MomentumEncoder({"p": parameter}, decay)
    for value in values[1:]:
        parameter.data.copy_(value)
        encoder.update()
    exact = decay**steps * values[0].double()
    for k in range(1, steps + 1):
        exact += (1 - decay) * decay ** (steps - k) * values[k].double()
    assert encoder.averages["p"].dtype == torch.float32  # where small steps do not vanish
    torch.testing.assert_close(encoder.averages["p"].double(), exact, rtol=1e-6, atol=1e-7)


def layers(dtype=torch.float32):
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_come_back_with_their_own_memory(dtype):
    model = layers(dtype)
    encoder = MomentumEncoder(dict(model.named_parameters()), 0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
        next(model.parameters())[0, 0] = float("nan")
    encoder.update()
    before = [(p.data_ptr(), p.detach().clone()) for p in model.parameters()]

    def fail_inside():
        with encoder.applied():
            for name, p in model.named_parameters():
                assert torch.equal(p, encoder.averages[name].to(dtype)) == (name != "0.weight")
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    for p, (place, value) in zip(model.parameters(), before, strict=True):
        assert p.data_ptr() == place
        assert torch.equal(p.view(torch.uint8), value.view(torch.uint8))
        assert p.requires_grad


@pytest.mark.parametrize("autocast", [False, True])
def test_averages_in_between_change_neither_outputs_nor_gradients(autocast):
    """Autocast keeps cast weights by parameter: those of averages must not serve as the present."""
    model, x = layers(), torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
    old = deepcopy(model)
    encoder = MomentumEncoder(dict(model.named_parameters()), 1.0)  # the averages stay `old`
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5)
    plain = deepcopy(model)

    def cast():
        return torch.autocast("cpu", torch.bfloat16, enabled=autocast)

    with cast():
        first = model(x)
        with encoder.applied():
            taught = model(x)
        second = model(x)
    (first * second).sum().backward()
    with cast():
        assert torch.equal(taught, old(x))
        want = plain(x)
        (want * plain(x)).sum().backward()
    assert torch.equal(first, want)
    assert torch.equal(second, want)
    assert not taught.requires_grad
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def numbered(first, count):
    """Pairs whose features and groups say their number."""
    n = torch.arange(first, first + count)
    return Bank(n[:, None].float(), -n[:, None].float(), torch.stack([n, n + 1000], 1))


@given(size=st.integers(0, 12), batches=st.lists(st.integers(1, 30), max_size=8))
@settings(max_examples=60, deadline=None)
def test_queue_holds_the_newest_pairs(size, batches):
    queue, want, first = FeatureQueue(size), deque(maxlen=size), 0
    for count in batches:
        batch = numbered(first, count)
        after = queue.after(batch)
        assert sorted(after.groups[count:, 0].tolist()) == list(want)
        assert torch.equal(after.image[:, 0].long(), after.groups[:, 0])
        assert torch.equal(after.text[:, 0].long(), -after.groups[:, 0])
        assert torch.equal(after.groups[:, 1], after.groups[:, 0] + 1000)
        queue.push(batch)
        want.extend(range(first, first + count))
        first += count


@pytest.mark.parametrize("batches", [[3], [3, 7], [20], [3, 7, 20, 3], [5], [2, 3]])
def test_queue_of_five_goes_on_from_its_state(batches):
    queue, first = FeatureQueue(5), 0
    for count in batches:
        queue.push(numbered(first, count))
        first += count
    resumed = FeatureQueue(5)
    resumed.load_state_dict(queue.state_dict(), torch.device("cpu"))
    for count in (4, 3, 9):
        for one in (queue, resumed):
            one.push(numbered(first, count))
        first += count
        for name, value in queue.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), name


def test_state_of_another_run_is_refused():
    queue = FeatureQueue(8)
    queue.push(numbered(0, 8))
    with pytest.raises(ValueError, match=r"queue of 8 pairs, and task.queue is 5"):
        FeatureQueue(5).load_state_dict(queue.state_dict(), torch.device("cpu"))
    short = FeatureQueue(5)
    short.push(numbered(0, 7))
    with pytest.raises(ValueError, match=r"queue of 5 pairs, and task.queue is 8"):
        FeatureQueue(8).load_state_dict(short.state_dict(), torch.device("cpu"))
    model = layers()
    everything = Momentum(
        MomentumEncoder(dict(model.named_parameters()), 0.9), FeatureQueue(0), 0
    ).state_dict()
    fewer = Momentum(MomentumEncoder({"0.bias": model[0].bias}, 0.9), FeatureQueue(0), 0)
    with pytest.raises(ValueError, match=r"averages other parameters.*0\.weight"):
        fewer.load_state_dict(everything)


def test_chance_follows_from_seed_step_and_micro_batch():
    def drawn(seed, step, batch):
        hooks = Momentum(MomentumEncoder({}, 0.9), FeatureQueue(0), seed)
        hooks.before_step(step - 1)
        hooks.remember(numbered(0, 3))
        hooks.before_step(step)
        for _ in range(batch):
            hooks.remember(numbered(0, 3))
        return tuple(hooks.uniform(4).tolist())

    places = [(s, t, b) for s in (0, 1) for t in (1, 2) for b in (0, 1)]
    assert [drawn(*p) for p in places] == [drawn(*p) for p in places]
    assert len({drawn(*p) for p in places}) == len(places)
