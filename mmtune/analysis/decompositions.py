"""CP, Tucker and per-block SVD of a stack [d_out, d_in, M], compared by the numbers they store."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import tensorly
import torch
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac, tucker

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("svd", "tucker", "cp")

# Singular values below 1e-7 of the stack's norm are float32 rounding: they are not decomposed.
NOTHING = 1e-14
# Alternating least squares is regularised by a ridge (the stack has norm 1), first by a wide one:
# it keeps components from growing without bound against each other, which float32 could not hold,
# and frees starts that would stick. The narrow one then lets go of what the wide one held back.
RIDGES = (1e-5, 1e-9)
TOLERANCE, ITERATIONS = 1e-7, 300
# On the whole stack an iteration costs much and improves little.
LAST_TOLERANCE, LAST_ITERATIONS = 1e-5, 50


@dataclass(frozen=True, eq=False)
class Frame:
    """A stack in orthonormal coordinates of the spaces that its three unfoldings span.

    Attributes:
        norm: of the stack.
        core: [n1, n2, n3] in float64 with norm 1, or zero.
        bases: [d_out, n1], [d_in, n2], [M, n3], orthonormal columns.
        spectra: for each unfolding, the shares of its squared singular values, descending.
    """

    norm: float
    core: Tensor = field(repr=False)
    bases: tuple[Tensor, Tensor, Tensor] = field(repr=False)
    spectra: tuple[Tensor, Tensor, Tensor] = field(repr=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        d_out, d_in, m = (len(basis) for basis in self.bases)
        return d_out, d_in, m


@dataclass(frozen=True, eq=False)
class Fit:
    """A decomposition of a stack.

    Attributes:
        method: "cp" or "tucker".
        rank: R.
        numbers: how many numbers it stores.
        error: ||X - X'|| / ||X||; 0 for a stack of zeros.
        starts: the same for every start of the alternating least squares, before the best of them
            was refined on the whole stack.
        factors: [d_out, r1], [d_in, r2], [M, r3], float64.
        core: [r1, r2, r3] of the Tucker form; None for CP, X' = sum_r a_r b_r c_r.
    """

    method: str
    rank: int
    numbers: int
    error: float
    starts: tuple[float, ...]
    factors: tuple[Tensor, Tensor, Tensor] = field(repr=False)
    core: Tensor | None = field(repr=False, default=None)

    def whole(self) -> Tensor:
        """X' [d_out, d_in, M]."""
        a, b, c = self.factors
        if self.core is None:
            return torch.einsum("or,ir,mr->oim", a, b, c)
        return torch.einsum("ojm,ij->oim", _times(self.core, (a, None, c)), b)


def numbers(method: str, shape: Sequence[int], rank: int) -> int:
    """How many numbers a decomposition of a stack of this shape stores.

    svd: M r (d_in + d_out). cp: R (d_in + d_out + M) + R. tucker: the same with R^3 for the last R;
    a mode with fewer than R entries has a rank of so many only.
    """
    d_out, d_in, m = shape
    if method == "svd":
        return m * rank * (d_in + d_out)
    if method == "cp":
        return rank * (d_in + d_out + m) + rank
    ranks = [min(rank, n) for n in shape]
    return sum(n * r for n, r in zip(shape, ranks, strict=True)) + math.prod(ranks)


def largest_rank(method: str, shape: Sequence[int], budget: int) -> int:
    """The largest rank whose decomposition stores at most `budget` numbers; 0 where none does.

    It is no larger than what represents every stack of this shape: the smaller side of a block for
    SVD, the largest mode for Tucker, the smallest product of two modes for CP.
    """
    d_out, d_in, m = shape
    end = {
        "svd": min(d_out, d_in),
        "tucker": max(shape),
        "cp": min(d_out * d_in, d_out * m, d_in * m),
    }[method]
    low, high = 0, end
    while low < high:
        middle = (low + high + 1) // 2
        if numbers(method, shape, middle) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def frame_of(stack: Tensor) -> Frame:
    """Orthonormal coordinates of a stack, and the spectra of its unfoldings.

    Raises:
        ValueError: the stack holds values that are not finite.
    """
    x = stack.detach().double()
    if not torch.isfinite(x).all():
        raise ValueError("the weight updates hold values that are not finite; nothing to analyse")
    norm = float(x.norm())
    x = x / (norm or 1.0)
    bases, spectra = [], []
    for mode in range(3):
        flat = x.movedim(mode, 0).flatten(1)
        shares, vectors = torch.linalg.eigh(flat @ flat.T)
        shares = shares.flip(0).clamp(min=0)
        kept = max(int((shares > NOTHING).sum()), 1)
        bases.append(vectors.flip(1)[:, :kept])
        spectra.append(shares)
    core = _times(x, [basis.T for basis in bases])
    return Frame(norm, core, cast(Any, tuple(bases)), cast(Any, tuple(spectra)))


def svd_errors(stack: Tensor) -> Tensor:
    """The relative error of cutting every block at rank r, for r = 1 .. min(d_out, d_in)."""
    blocks = stack.detach().double().movedim(-1, 0)
    if blocks.shape[1] > blocks.shape[2]:
        blocks = blocks.mT
    squares = torch.linalg.eigvalsh(blocks @ blocks.mT).flip(1).clamp(min=0).sum(0)
    total = squares.sum()
    left = (total - squares.cumsum(0)).clamp(min=0)
    return (left / total).sqrt() if total > 0 else left


def fit_tucker(frame: Frame, rank: int) -> Fit:
    """Tucker decomposition with R components a mode, by higher-order orthogonal iteration."""
    core, turns = _tucker(frame.core, rank)
    factors = tuple(basis @ turn for basis, turn in zip(frame.bases, turns, strict=True))
    error = _distance(frame.core, _times(core, turns)) if frame.norm else 0.0
    return Fit(
        "tucker",
        rank,
        numbers("tucker", frame.shape, rank),
        error,
        (error,),
        cast(Any, factors),
        core * frame.norm,
    )


def fit_cp(
    frame: Frame,
    rank: int,
    starts: int,
    generator: torch.Generator,
    guess: Sequence[Tensor] | None = None,
) -> Fit:
    """CP decomposition, the best of several starts.

    The stack is first cut down to its Tucker core of rank R, on which alternating least squares is
    fast; the best result is refined on the whole stack. Starts can stick in local minima, so one
    start is no measure of what CP can do: the errors of all are kept.

    Args:
        frame: of the stack.
        rank: R.
        starts: how many; the first is made of singular vectors, the others are random.
        generator: draws them.
        guess: factors [d_out, R], [d_in, R], [M, R] of a further start.
    """
    if frame.norm == 0:
        zeros = tuple(torch.zeros(n, rank, dtype=torch.float64) for n in frame.shape)
        return Fit("cp", rank, numbers("cp", frame.shape, rank), 0.0, (0.0,), cast(Any, zeros))
    core, turns = _tucker(frame.core, rank)
    begun = _starts(core, rank, starts, generator)
    if guess is not None:
        inside = [t.T @ b.T @ g for t, b, g in zip(turns, frame.bases, guess, strict=True)]
        begun.append([inside[0] / frame.norm, *inside[1:]])
    grown = []
    for found in begun:
        for ridge in RIDGES:
            found = _parafac(core, rank, found, ridge)
        grown.append([turn @ factor for turn, factor in zip(turns, found, strict=True)])
    errors = [_distance(frame.core, torch.einsum("ar,br,cr->abc", *found)) for found in grown]
    best = min(range(len(errors)), key=errors.__getitem__)
    found, error = grown[best], errors[best]
    if core.shape != frame.core.shape:
        last = (RIDGES[-1], LAST_ITERATIONS, LAST_TOLERANCE)
        refined = _parafac(frame.core, rank, found, *last)
        distance = _distance(frame.core, torch.einsum("ar,br,cr->abc", *refined))
        found, error = (refined, distance) if distance < error else (found, error)
    factors = [basis @ f for basis, f in zip(frame.bases, found, strict=True)]
    factors[0] = factors[0] * frame.norm
    count = numbers("cp", frame.shape, rank)
    return Fit("cp", rank, count, error, tuple(errors), cast(Any, tuple(factors)))


def _tucker(x: Tensor, rank: int) -> tuple[Tensor, list[Tensor]]:
    """Core and orthonormal factors; `x` itself where the rank cuts nothing."""
    ranks = [min(rank, n) for n in x.shape]
    start = [torch.eye(n, r, dtype=x.dtype) for n, r in zip(x.shape, ranks, strict=True)]
    if ranks == list(x.shape):
        return x, start
    # The coordinates are the unfoldings' singular vectors, whose first R are the usual start.
    init = (_times(x, [s.T for s in start]), start)
    with _in_torch():
        core, factors = cast(Any, tucker)(x, ranks, init=init, n_iter_max=20, tol=1e-6)
    return core, list(factors)


def _starts(core: Tensor, rank: int, count: int, generator: torch.Generator) -> list[Any]:
    drawn = [
        [torch.randn(n, rank, generator=generator, dtype=core.dtype) for n in core.shape]
        for _ in range(count - 1)
    ]
    return ["svd", *drawn]


def _parafac(
    x: Tensor,
    rank: int,
    start: Any,
    ridge: float,
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
) -> list[Tensor]:
    with _in_torch():
        init = start if isinstance(start, str) else CPTensor((None, list(start)))
        found = cast(Any, parafac)(
            x,
            rank,
            n_iter_max=iterations,
            init=init,
            tol=tolerance,
            l2_reg=ridge,
            linesearch=True,
            random_state=0,
        )
    return list(found.factors)


@contextmanager
def _in_torch() -> Iterator[None]:
    """Tensorly computing on torch tensors, without a word where R exceeds the size of a mode."""
    with cast(Any, tensorly).backend_context("pytorch"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _times(x: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Multiply each mode of `x` by a matrix; None leaves the mode as it is."""
    for mode, matrix in enumerate(matrices):
        if matrix is not None:
            x = torch.tensordot(matrix, x, ([1], [mode])).movedim(0, mode)  # type: ignore[arg-type]
    return x


def _distance(x: Tensor, found: Tensor) -> float:
    """||x - found|| for x of norm 1; a diverged fit is infinitely far."""
    distance = float((x - found).norm())
    return distance if math.isfinite(distance) else math.inf
