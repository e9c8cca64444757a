"""The formulas of ROME, MEMIT and AlphaEdit do what they claim, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editing.closed_form.covariances import Covariance
from editing.methods.alphaedit import null_space, projected
from editing.methods.memit import least_squares
from editing.methods.rome import rank_one

D, E = 12, 7  # widths of keys and values
SEEDS = st.integers(0, 10_000)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def second_moment(seed, tokens=50, rank=D):
    """Of `tokens` keys within `rank` directions; the keys [tokens, D] with it."""
    keys = drawn(seed, tokens, rank) @ drawn(seed + 1, rank, D)
    return keys.T @ keys / tokens, keys


def known(moment, ridge=1e-9):
    return Covariance(moment, 50, ridge, torch.device("cpu"))


def size(change, moment):
    return float(torch.trace(change @ moment @ change.T))


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_rome_meets_the_value_with_the_least_change(seed):
    moment, _ = second_moment(seed)
    weight, key, value = drawn(seed + 2, E, D), drawn(seed + 3, D), drawn(seed + 4, E)
    covariance = known(moment)
    direction = covariance.solved(key[None])[0]
    change = rank_one(value - weight @ key, key, direction).dense()
    torch.testing.assert_close((weight + change) @ key, value, rtol=1e-9, atol=1e-9)
    assert torch.linalg.matrix_rank(change) == 1
    least = size(change, covariance.matrix)
    for other in range(5):  # what else meets the value differs by what the key does not see
        free = drawn(seed + 10 + other, E, D)
        free -= (free @ key)[:, None] * key / (key @ key)
        torch.testing.assert_close((weight + change + free) @ key, value, rtol=1e-9, atol=1e-9)
        assert size(change + free, covariance.matrix) > least * (1 + 1e-12)


def test_rome_meets_the_value_along_another_direction_too():
    key, direction, shift = drawn(0, D), drawn(1, D), drawn(2, E)
    change = rank_one(shift, key, direction)
    torch.testing.assert_close(change.dense() @ key, shift, rtol=1e-9, atol=1e-9)
    aside = drawn(3, D)
    aside -= (aside @ direction) * direction / (direction @ direction)
    torch.testing.assert_close(change.dense() @ aside, torch.zeros(E, dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 20), st.floats(0.01, 100))
def test_memit_minimises_its_objective(seed, count, weight):
    moment, _ = second_moment(seed)
    covariance = known(moment)
    keys, residual = drawn(seed + 2, count, D), drawn(seed + 3, E, count)
    right = least_squares(keys, covariance.solved(keys), weight)
    change = (residual @ right).requires_grad_()
    missed = (change @ keys.T - residual).square().sum()
    loss = missed + weight * torch.trace(change @ covariance.matrix @ change.T)
    (gradient,) = torch.autograd.grad(loss, change)
    assert gradient.abs().max() < 1e-8 * (1 + residual.abs().max() * keys.abs().max() * count)
    direct = torch.linalg.solve(weight * covariance.matrix + keys.T @ keys, keys.T)
    torch.testing.assert_close(right, direct.T, rtol=1e-7, atol=1e-9)


def test_memit_with_little_to_preserve_meets_its_values():
    moment, _ = second_moment(0)
    keys, residual = drawn(2, 4, D), drawn(3, E, 4)
    change = residual @ least_squares(keys, known(moment).solved(keys), 1e-9)
    torch.testing.assert_close(change @ keys.T, residual, rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 6), st.integers(0, 6), st.floats(0.01, 10))
def test_alphaedit_minimises_its_objective_in_the_null_space(seed, count, earlier, ridge):
    moment, preserved = second_moment(seed, rank=5)
    covariance = known(moment)
    keys, old = drawn(seed + 2, count, D), drawn(seed + 3, earlier, D)
    residual = drawn(seed + 4, E, count)
    p = projected(torch.eye(D, dtype=torch.float64), covariance, 1e-6)
    torch.testing.assert_close(p @ p, p)
    right = null_space(keys @ p, old @ p, ridge)
    change = residual @ right
    assert (change @ preserved.T).abs().max() < 1e-9 * (1 + change.abs().max())
    torch.testing.assert_close(change @ p, change)
    free = change.clone().requires_grad_()
    within = free @ p
    loss = (within @ keys.T - residual).square().sum() + (within @ old.T).square().sum()
    (gradient,) = torch.autograd.grad(loss + ridge * within.square().sum(), free)
    assert gradient.abs().max() < 1e-8 * (1 + residual.abs().max())
    # The published form: a system of the keys' width, not symmetric.
    system = p @ (keys.T @ keys + old.T @ old) + ridge * torch.eye(D, dtype=torch.float64)
    published = torch.linalg.solve(system, p @ keys.T @ residual.T).T
    torch.testing.assert_close(change, published, rtol=1e-8, atol=1e-9)


def test_earlier_keys_are_left_alone():
    moment, _ = second_moment(0, rank=5)
    covariance = known(moment)
    new, old = (projected(drawn(s, 2, D), covariance, 1e-6) for s in (2, 3))
    residual = drawn(4, E, 2)
    alone, kept = (residual @ null_space(new, rows, 1e-6) for rows in (old[:0], old))
    assert (alone @ old.T).norm() > 0.1
    assert (kept @ old.T).norm() < 1e-4 * (alone @ old.T).norm()
    torch.testing.assert_close(kept @ new.T, residual, rtol=1e-4, atol=1e-4)


def test_without_a_null_space_nothing_is_projected():
    moment, _ = second_moment(0)
    with pytest.raises(ValueError, match=r"no direction of the 12 is free .* threshold is 1e-12"):
        projected(drawn(1, 2, D), known(moment), 1e-12)
