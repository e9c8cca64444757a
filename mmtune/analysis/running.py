"""The analysis of a source of weight updates, from its stacks to the files that show it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmtune.analysis.components import Similarity, learned_of, similarities
from mmtune.analysis.decompositions import (
    METHODS,
    Frame,
    fit_cp,
    fit_tucker,
    frame_of,
    largest_rank,
    numbers,
    svd_errors,
)
from mmtune.analysis.deltas import Block, Stack, stacked
from mmtune.analysis.ledger import Ledger
from mmtune.analysis.page import render_page
from mmtune.runs import RunFolder, manifest, write_text

if TYPE_CHECKING:
    from torch import Tensor

    from mmtune.analysis.components import Learned
    from mmtune.analysis.sources import Source

# Of the numbers that an SVD of rank 1 of every block stores; below 1, SVD cannot go.
BUDGETS = (0.25, 0.5, 1.0, 2.0)
PAGE, LINES, FITS = "analysis.html", "analysis.jsonl", "fits.jsonl"


@dataclass(frozen=True)
class Mode:
    """One block's update."""

    block: Block
    norm: float


@dataclass(frozen=True)
class Measured:
    """A decomposition of a stack under a budget.

    Attributes:
        stack: the block shape.
        budget: numbers that it may store.
        method: one of `METHODS`.
        rank: the largest that the budget allows.
        numbers: what it stores.
        error: ||X - X'|| / ||X||.
        starts: errors of all starts before refinement; one for SVD and Tucker.
    """

    stack: str
    budget: int
    method: str
    rank: int
    numbers: int
    error: float
    starts: tuple[float, ...]


@dataclass(frozen=True)
class StackFacts:
    """What one stack is like.

    Attributes:
        stack: the block shape.
        shape: (d_out, d_in, M).
        norm: Frobenius norm.
        spectra: for rows, columns and blocks: shares of the unfolding's squared singular values.
        modes: the blocks.
    """

    stack: str
    shape: tuple[int, int, int]
    norm: float
    spectra: tuple[list[float], list[float], list[float]]
    modes: tuple[Mode, ...]


@dataclass(frozen=True)
class Components:
    """The energies of the components of learned factors, summing to 1, descending."""

    factors: str
    energies: list[float]


@dataclass(frozen=True)
class Analysis:
    """Everything that was found about one source."""

    title: str
    parameters: int
    left_out: int
    stacks: tuple[StackFacts, ...]
    components: tuple[Components, ...]
    similarities: tuple[Similarity, ...]
    fits: tuple[Measured, ...]

    def lines(self) -> list[dict[str, Any]]:
        """The same as records, each with its kind."""
        head = {"title": self.title, "parameters": self.parameters, "left_out": self.left_out}
        parts = {"stack": self.stacks, "components": self.components}
        parts |= {"similarity": self.similarities, "fit": self.fits}
        found = [{"kind": kind, **asdict(part)} for kind in parts for part in parts[kind]]
        return [{"kind": "source", **head}, *found]


def analyze(
    source: Source,
    out: Path,
    budgets: Sequence[float] = BUDGETS,
    starts: int = 3,
    seed: int = 0,
    progress: bool = True,
) -> Analysis:
    """Study the updates of a source; write a page and JSON lines into `out`.

    An analysis that was stopped keeps its finished decompositions and goes on with the others.

    Args:
        source: see `mmtune.analysis.sources.find`.
        out: folder to write into.
        budgets: sizes of the decompositions, as parts of what SVD of rank 1 of every block stores;
            the size of learned factors is added.
        starts: starts of each CP decomposition.
        seed: of its random starts.
        progress: draw a progress bar.

    Raises:
        ValueError: a setting that makes no sense, or updates that are not finite.
    """
    from tqdm import tqdm

    check(budgets, starts)
    subjects = [
        _Subject(stack, frame_of(stack.tensor), learned_of(stack, source.learned))
        for stack in stacked(source.deltas)
    ]
    plan = [(s, *item) for s in subjects for item in _plan(s.frame.shape, budgets, s.learned)]
    ledger, fits = Ledger(out / FITS), []
    for subject, budget, method, rank in (bar := tqdm(plan, unit="fit", disable=not progress)):
        bar.set_description(f"{subject.stack.key} {method} {rank}")
        of = {"stack": subject.digest, "method": method, "rank": rank, "starts": starts}
        of |= {"seed": seed, "guess": subject.learned is not None}
        found = ledger.find(of, partial(_fit, subject, method, rank, starts, seed))
        count, errors = numbers(method, subject.frame.shape, rank), tuple(found["starts"])
        key = subject.stack.key
        fits.append(Measured(key, budget, method, rank, count, found["error"], errors))
    analysis = Analysis(
        source.title,
        source.parameters,
        source.left_out,
        tuple(_facts(subject) for subject in subjects),
        tuple(_components(one) for one in source.learned),
        tuple(a for s in subjects for a in similarities(s.stack, s.learned)),
        tuple(fits),
    )
    _write(analysis, source, out, seed)
    return analysis


@dataclass(frozen=True, eq=False)
class _Subject:
    """A stack, its coordinates, and the factors that its blocks were learned with, if any."""

    stack: Stack
    frame: Frame
    learned: Learned | None

    @cached_property
    def digest(self) -> str:
        """Tells stacks of other content apart."""
        return hashlib.sha256(self.stack.tensor.contiguous().numpy().tobytes()).hexdigest()

    @cached_property
    def svd_errors(self) -> Tensor:
        """Errors of cutting every block at each rank: one decomposition serves all budgets."""
        return svd_errors(self.stack.tensor)


def check(budgets: Sequence[float], starts: int) -> None:
    """ValueError for what `analyze` would refuse, before anything is loaded."""
    require_starts(starts)
    if not budgets or not min(budgets) > 0:
        raise ValueError(f"budgets must be positive, got {', '.join(map(str, budgets)) or 'none'}")


def require_starts(starts: int) -> None:
    """ValueError where no start is asked for."""
    if starts < 1:
        raise ValueError(f"starts must be at least 1, got {starts}. Try 3.")


def default_folder(path: Path | None, out: Path | None) -> Path:
    """`out`, or analysis/ in the folder that is analysed."""
    if out is not None:
        return out
    if path is None:
        raise ValueError(
            "what is neither a run nor an adapter folder needs --out FOLDER to write to."
        )
    return RunFolder(path).path / "analysis"


def _plan(
    shape: tuple[int, int, int], budgets: Sequence[float], learned: Learned | None
) -> list[tuple[int, str, int]]:
    """(numbers, method, rank) of every decomposition, smallest budget first."""
    one = numbers("svd", shape, 1)
    sizes = {round(part * one) for part in budgets}
    if learned is not None:
        sizes.add(numbers("cp", shape, len(learned.u)))
    ranks = [(s, m, largest_rank(m, shape, s)) for s in sorted(sizes) for m in METHODS]
    return [(size, method, rank) for size, method, rank in ranks if rank]


def _fit(subject: _Subject, method: str, rank: int, starts: int, seed: int) -> dict[str, Any]:
    if method == "svd":
        error = float(subject.svd_errors[rank - 1])
        return {"error": error, "starts": [error]}
    if method == "tucker":
        fit = fit_tucker(subject.frame, rank)
    else:
        # A generator of its own: a resumed analysis must draw what an uninterrupted one draws.
        generator = torch.Generator().manual_seed(seed)
        guess = subject.learned.cp(rank, generator) if subject.learned else None
        fit = fit_cp(subject.frame, rank, starts, generator, guess)
    return {"error": fit.error, "starts": list(fit.starts)}


def _facts(subject: _Subject) -> StackFacts:
    stack, frame = subject.stack, subject.frame
    rows, columns, blocks = (s.tolist() for s in frame.spectra)
    norms = stack.tensor.double().flatten(0, 1).norm(dim=0).tolist()
    modes = tuple(Mode(block, norm) for block, norm in zip(stack.blocks, norms, strict=True))
    return StackFacts(stack.key, frame.shape, frame.norm, (rows, columns, blocks), modes)


def _components(learned: Learned) -> Components:
    norms = learned.norms().sort(descending=True).values
    return Components(learned.key, (norms / (norms.sum() or 1)).tolist())


def _write(analysis: Analysis, source: Source, out: Path, seed: int) -> None:
    lines = [json.dumps(line, ensure_ascii=False) for line in analysis.lines()]
    write_text(out / LINES, "\n".join(lines) + "\n")
    made = manifest(seed, "CPU", source.files, sys.argv)
    made["versions"]["tensorly"] = version("tensorly")
    write_text(out / PAGE, render_page(analysis, made))
