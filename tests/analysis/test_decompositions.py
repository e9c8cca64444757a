"""Decompositions against their definitions, computed a second time with numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.analysis.decompositions import (
    METHODS,
    fit_cp,
    fit_tucker,
    frame_of,
    largest_rank,
    numbers,
    svd_errors,
)

SHAPE = (7, 6, 5)


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cp_tensor(rank, shape=SHAPE):
    a, b, c = (noise(n, rank, seed=i) for i, n in enumerate(shape))
    return torch.einsum("or,ir,mr->oim", a, b, c)


def draws():
    return torch.Generator().manual_seed(0)


def fit(method, stack, rank, starts=3):
    frame = frame_of(stack)
    return fit_tucker(frame, rank) if method == "tucker" else fit_cp(frame, rank, starts, draws())


def by_numpy(found):
    """The decomposition's definition, term by term."""
    a, b, c = (factor.numpy() for factor in found.factors)
    whole = np.zeros((len(a), len(b), len(c)))
    if found.core is None:
        for r in range(a.shape[1]):
            whole += np.multiply.outer(np.outer(a[:, r], b[:, r]), c[:, r])
        return whole
    return np.einsum("xyz,ox,iy,mz->oim", found.core.numpy(), a, b, c)


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("method", ["cp", "tucker"])
def test_reconstruction_and_error_are_what_numpy_finds(method, rank):
    stack = noise(*SHAPE)
    found = fit(method, stack, rank)
    whole = by_numpy(found)
    np.testing.assert_allclose(found.whole().numpy(), whole, atol=1e-10)
    error = np.linalg.norm(stack.double().numpy() - whole) / np.linalg.norm(stack.double().numpy())
    assert found.error == pytest.approx(error, abs=1e-7)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_counts_are_those_of_the_tensors_stored(rank):
    stack = noise(*SHAPE)
    cp, tucker = fit("cp", stack, rank), fit("tucker", stack, rank)
    lambdas = torch.ones(rank)
    assert cp.numbers == sum(t.numel() for t in (*cp.factors, lambdas))
    assert tucker.numbers == sum(t.numel() for t in (*tucker.factors, tucker.core))
    u, s, v = torch.linalg.svd(stack.movedim(-1, 0), full_matrices=False)
    kept = (u[..., :rank] * s[:, None, :rank]).numel() + v[:, :rank].numel()
    assert numbers("svd", SHAPE, rank) == kept


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    budget=st.integers(0, 3000),
    method=st.sampled_from(METHODS),
)
@settings(max_examples=80, deadline=None)
def test_largest_rank_is_the_last_that_fits(shape, budget, method):
    rank = largest_rank(method, shape, budget)
    d_out, d_in, m = shape
    enough = {"svd": min(d_out, d_in), "tucker": max(shape)}.get(
        method, min(d_out * d_in, d_out * m, d_in * m)
    )
    assert rank == 0 or numbers(method, shape, rank) <= budget
    assert rank == enough or numbers(method, shape, rank + 1) > budget


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_a_stack_of_exact_cp_rank_is_recovered(rank):
    stack = cp_tensor(rank)
    assert fit("cp", stack, rank).error < 1e-6
    assert fit("tucker", stack, rank).error < 1e-6


def test_more_components_than_the_stack_has_find_it_too():
    stack = cp_tensor(2)
    found = fit("cp", stack, 9)
    assert found.error < 1e-5
    assert all(torch.isfinite(factor).all() for factor in found.factors)


def test_the_best_start_is_kept_and_refined():
    stack = noise(9, 8, 7)
    found = fit("cp", stack, 4, starts=5)
    assert len(found.starts) == 5
    assert found.error <= min(found.starts)
    assert max(found.starts) > min(found.starts)
    again = fit("cp", stack, 4, starts=5)
    assert again.starts == found.starts
    assert torch.equal(again.whole(), found.whole())


def test_a_guess_is_a_start_of_its_own():
    stack = cp_tensor(4)
    a, b, c = (noise(n, 4, seed=i).double() for i, n in enumerate(SHAPE))
    found = fit_cp(frame_of(stack), 4, 1, draws(), guess=(a, b, c))
    assert len(found.starts) == 2
    assert found.starts[1] < 1e-6


def test_svd_errors_are_those_of_truncated_blocks():
    stack = noise(7, 4, 5)
    errors = svd_errors(stack)
    assert len(errors) == 4
    blocks = stack.double().movedim(-1, 0)
    u, s, v = torch.linalg.svd(blocks, full_matrices=False)
    for rank in (1, 2, 3):
        cut = (u[..., :rank] * s[:, None, :rank]) @ v[:, :rank]
        assert float(errors[rank - 1]) == pytest.approx(
            float((blocks - cut).norm() / blocks.norm()), rel=1e-9
        )
    assert float(errors[-1]) < 1e-7


def test_spectra_are_the_squared_singular_values_of_the_unfoldings():
    stack = noise(*SHAPE)
    frame = frame_of(stack)
    for mode in range(3):
        flat = np.moveaxis(stack.double().numpy(), mode, 0).reshape(SHAPE[mode], -1)
        values = np.linalg.svd(flat, compute_uv=False) ** 2
        np.testing.assert_allclose(frame.spectra[mode].numpy(), values / values.sum(), atol=1e-12)


def test_tucker_loses_what_its_core_lacks():
    stack = noise(*SHAPE)
    found = fit("tucker", stack, 3)
    lost = 1 - float(found.core.norm() / stack.double().norm()) ** 2
    assert found.error == pytest.approx(lost**0.5, rel=1e-9)


@pytest.mark.parametrize("method", ["cp", "tucker"])
def test_zeros_are_decomposed_into_zeros(method):
    found = fit(method, torch.zeros(SHAPE), 2)
    assert found.error == 0
    assert not found.whole().any()
    assert found.whole().shape == SHAPE
    assert not svd_errors(torch.zeros(SHAPE)).any()


def test_values_that_are_not_finite_are_refused():
    stack = noise(*SHAPE)
    stack[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        frame_of(stack)


def test_half_precision_is_decomposed_in_double():
    stack = cp_tensor(2).bfloat16()
    found = fit("cp", stack, 2)
    assert found.whole().dtype == torch.float64
    assert found.error == pytest.approx(fit("cp", stack.double(), 2).error, abs=1e-9)
