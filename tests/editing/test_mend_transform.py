"""MEND's transform: golden numbers, the start, statistics, gradients, captured layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from editing.methods.mend_transform import (
    GradientTransform,
    RunningStatistics,
    TransformOptions,
    captured,
    nonzero_rows,
    update_factors,
)
from editing.metrics.answers import AnswerTokens, answer_nll

from . import golden
from .golden import ROWS, STATISTICS

GOLDEN, ARRAYS = golden.settings("mend")["cases"], golden.Arrays("mend")
STATIC = [name for name in GOLDEN if name.startswith("m")]
SIGNS = ("descent", "reference")


def close(found, want, tolerance):
    torch.testing.assert_close(found.detach(), want, **tolerance, check_dtype=False)


def transform_of(case: str, combine: bool, layers: int, **options) -> GradientTransform:
    widths = ARRAYS[case, "x"].shape[-1], ARRAYS[case, "delta"].shape[-1]
    chosen = TransformOptions(combine=combine, layers=layers, **options)
    return filled(GradientTransform(*widths, chosen), case).eval()


def filled(transform: GradientTransform, case: str) -> GradientTransform:
    prefixes = [""] if transform.options.combine else ["x_", "d_"]
    for prefix, network in zip(prefixes, transform.networks, strict=True):
        for i, layer in enumerate(network):
            state = {name: ARRAYS[case, f"{prefix}{name}{i}"] for name in layer.state_dict()}
            layer.load_state_dict(state)
    return transform


def static(case: str) -> GradientTransform:
    given = GOLDEN[case]
    transform = transform_of(
        case,
        given["combine"],
        given["n_net_layers"],
        rank=given["rank"],
        normalise=given["norm"],
        modes=given["n_modes"],
    )
    if given["norm"]:
        for name in ("x", "d"):
            statistics = getattr(transform, "x_statistics" if name == "x" else "delta_statistics")
            statistics.mean.copy_(ARRAYS[case, f"{name}_mean"])
            statistics.squares.copy_(ARRAYS[case, f"{name}_std"].double().square())
            statistics.count.fill_(2)
    return transform


@pytest.mark.parametrize("case", STATIC)
def test_transform_and_update(case):
    given = GOLDEN[case]
    rows = nonzero_rows(ARRAYS[case, "x"], ARRAYS[case, "delta"])
    assert len(rows[0]) == given["n_rows_kept"]
    x, delta = static(case)(ARRAYS[case, "x"], ARRAYS[case, "delta"], given["mode"])
    close(x, ARRAYS[case, "out_x_tilde"], ROWS)
    close(delta, ARRAYS[case, "out_delta_tilde"], ROWS)
    updates = {}
    for sign in SIGNS:
        left, right = update_factors(x, delta, ARRAYS[case, "lr"], sign)
        updates[sign] = left @ right
    close(updates["reference"], ARRAYS[case, "out_delta_w"], ROWS)
    assert torch.equal(updates["descent"], -updates["reference"])


def test_a_rank_above_the_width_is_cut():
    layer = static("m6_three_layers_rank_clip").networks[0][0]
    assert layer.u.shape == (7, 7)


def test_captured_rows_give_the_weight_gradient():
    linear = nn.Linear(5, 11)
    linear.load_state_dict({"weight": ARRAYS["g0", "weight"], "bias": ARRAYS["g0", "bias"]})
    linear.requires_grad_(False)
    with captured({"head": linear}) as found:
        logits = linear(ARRAYS["g0", "x"])
    loss = answer_nll(AnswerTokens.of_sequence(logits, ARRAYS["g0", "labels"]))
    close(loss, ARRAYS["g0", "out_nll"], golden.LOGS)
    x, delta = found.rows(loss)["head"]
    assert torch.equal(x, ARRAYS["g0", "x"])
    close(delta, ARRAYS["g0", "out_delta"], STATISTICS)
    kept = nonzero_rows(x, delta)
    assert len(kept[0]) == int(ARRAYS["g0", "out_n_rows_kept"]) == GOLDEN["g0"]["n_rows_kept"]
    identity = GradientTransform(5, 11, TransformOptions(rank=3, normalise=False))
    left, right = update_factors(*identity(x, delta), rate=0.5, sign="reference")
    close(left @ right / 0.5, ARRAYS["g0", "out_grad_weight"], STATISTICS)
    assert linear.weight.grad is None


def test_running_statistics_call_by_call():
    given = GOLDEN["w0"]
    options = TransformOptions(rank=given["rank"])
    transform = filled(GradientTransform(given["d_in"], given["d_out"], options), "w0").train()
    for call, count in enumerate(given["count_after_call"]):
        part = lambda name, call=call: ARRAYS["w0", f"call{call}_{name}"]  # noqa: E731
        x, delta = transform(part("x"), part("delta"))
        for name, found in (("x", transform.x_statistics), ("d", transform.delta_statistics)):
            assert int(found.count) == count
            close(found.mean, part(f"out_{name}_mean"), STATISTICS)
            close(found.squares, part(f"out_{name}_s"), STATISTICS)
            close(found.std, part(f"out_{name}_std"), STATISTICS)
        close(x, part("out_x_tilde"), ROWS)
        close(delta, part("out_delta_tilde"), ROWS)


def test_statistics_are_those_of_all_rows_whatever_the_calls():
    torch.manual_seed(0)
    rows = torch.randn(50, 4, dtype=torch.float64) * 3 + 100
    parts = RunningStatistics(4)
    for some in (rows[:1], rows[1:1], rows[1:30], rows[30:]):
        parts.update(some)
    torch.testing.assert_close(parts.mean, rows.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(parts.std, rows.std(0), rtol=1e-13, atol=0)


def test_a_cast_keeps_statistics_exact():
    statistics = RunningStatistics(2)
    statistics.update(torch.tensor([[1000.1, 0.1], [1000.3, 0.7]], dtype=torch.float64))
    mean, std = statistics.mean.clone(), statistics.std
    statistics.to(torch.bfloat16)
    assert torch.equal(statistics.mean, mean)
    assert torch.equal(statistics.std, std)
    assert statistics(torch.zeros(1, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_evaluation_leaves_statistics_alone_and_saving_keeps_them():
    torch.manual_seed(0)
    rows = torch.randn(7, 3), torch.randn(7, 2)
    transform = GradientTransform(3, 2, TransformOptions(rank=2))
    transform.train()(*rows)
    before = {k: v.clone() for k, v in transform.state_dict().items()}
    want = transform.eval()(*rows)
    assert all(torch.equal(v, before[k]) for k, v in transform.state_dict().items())
    other = GradientTransform(3, 2, TransformOptions(rank=2)).eval()
    other.load_state_dict(before)
    assert all(torch.equal(a, b) for a, b in zip(want, other(*rows), strict=True))


@pytest.mark.parametrize("combine", [True, False])
def test_a_fresh_transform_is_the_identity_and_can_learn(combine):
    generator = torch.Generator().manual_seed(3)
    options = TransformOptions(rank=4, combine=combine, normalise=False, modes=2)
    transform = GradientTransform(5, 3, options, generator)
    rows = torch.randn(6, 5, generator=generator), torch.randn(6, 3, generator=generator)
    found = transform(*rows, mode=1)
    assert all(torch.equal(a, b) for a, b in zip(found, rows, strict=True))
    sum(part.square().sum() for part in found).backward()
    for network in transform.networks:
        for layer in network:
            assert layer.u.grad.abs().sum() > 0
            assert layer.shift.grad[1].abs().sum() > 0
            assert layer.shift.grad[0].abs().sum() == 0


def test_a_fresh_transform_steps_downhill():
    torch.manual_seed(2)
    linear, x, labels = nn.Linear(6, 9).double(), torch.randn(1, 8, 6).double(), torch.arange(8)
    labels = labels[None].clone()
    with captured({"it": linear}) as found:
        before = answer_nll(AnswerTokens.of_sequence(linear(x), labels))
    identity = GradientTransform(6, 9, TransformOptions(rank=2, normalise=False)).double()
    rows = identity(*found.rows(before)["it"])
    losses = {}
    for sign in SIGNS:
        left, right = update_factors(*rows, rate=0.1, sign=sign)
        logits = nn.functional.linear(x, linear.weight + left @ right, linear.bias)
        losses[sign] = answer_nll(AnswerTokens.of_sequence(logits, labels))
    assert losses["descent"] < before < losses["reference"]


@pytest.mark.parametrize("combine", [True, False])
def test_gradients(combine):
    generator = torch.Generator().manual_seed(4)
    options = TransformOptions(rank=2, combine=combine, modes=2)
    transform = GradientTransform(3, 2, options, generator).double()
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    for parameter in transform.parameters():
        parameter.data = draw(*parameter.shape)
    x, delta, rate = draw(5, 3), draw(5, 2), torch.tensor(0.3, dtype=torch.float64)
    transform.train()(x, delta, 0)
    transform.eval()
    names, values = zip(*transform.named_parameters(), strict=True)

    def update(x, delta, rate, *parameters):
        given = dict(zip(names, parameters, strict=True))
        rows = torch.func.functional_call(transform, given, (x, delta, 1))
        left, right = update_factors(*rows, rate)
        return left @ right

    inputs = [t.detach().requires_grad_() for t in (x, delta, rate, *values)]
    assert torch.autograd.gradcheck(update, inputs)


def test_capturing_two_layers_of_a_frozen_model():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(2, 7, 4)
    model(x).square().mean().backward()
    want = {i: model[i].weight.grad.clone() for i in (2, 4)}
    model.requires_grad_(False).zero_grad()
    with captured({"2": model[2], "4": model[4]}) as found:
        loss = model(x).square().mean()
    for name, (rows, delta) in found.rows(loss).items():
        gradient = delta.flatten(0, 1).T @ rows.flatten(0, 1)
        torch.testing.assert_close(gradient, want[int(name)])
        assert not rows.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_layers_are_let_go_also_after_an_exception():
    linear = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="layer it ran twice"), captured({"it": linear}):
        linear(linear(torch.zeros(1, 2)))
    linear(linear(torch.zeros(1, 2)))


def test_refusals():
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        GradientTransform(3, 2).train()(torch.ones(1, 3), torch.ones(1, 2))
    shared = GradientTransform(3, 2, TransformOptions(modes=2, normalise=False))
    rows = torch.ones(2, 3), torch.ones(2, 2)
    for mode in (None, 2, -1):
        with pytest.raises(ValueError, match=r"mode must be in 0\.\.1"):
            shared(*rows, mode=mode)
    with pytest.raises(ValueError, match="mode must be None"):
        GradientTransform(3, 2, TransformOptions(normalise=False))(*rows, mode=0)
