"""Numbers of a probe: accuracy with intervals, what styles change, and where answers disagree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import comb
from typing import TYPE_CHECKING

import numpy as np

from mmtune.metrics.intervals import cluster_numbers, mean_metrics
from mmtune.probe.items import NO, YES, Item
from mmtune.probe.parsing import popes

if TYPE_CHECKING:
    from mmtune.probe.outcomes import Outcome
    from mmtune.tasks.base import Metric

RESAMPLES = 1000
OVERALL = "all"


@dataclass(frozen=True)
class Cell:
    """One client, style and category.

    Attributes:
        accuracy: mean of right answers with a 95 % bootstrap interval over images; replies of which
            nothing could be made count as wrong, requests that failed do not count.
        failed: requests without a reply.
        unparsed: share of replies of which nothing could be made.
        yes: share of "yes" among answers to yes-no questions; None where there are none.
        precision, recall, f1: of "yes", as POPE counts them; None where they are undefined.
        errors, likeness: mean CER and ANLS of texts to be read.
        contradictions: share of reasoned replies whose reasoning says another answer.
    """

    accuracy: Metric | None
    failed: int
    unparsed: float | None
    yes: float | None = None
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    errors: float | None = None
    likeness: float | None = None
    contradictions: float | None = None


@dataclass(frozen=True)
class Paired:
    """A style against "simple", or a model against the first one, on the items that both answered.

    Attributes:
        n: such items.
        difference: of accuracy, with its paired interval.
        better, worse: items right now alone, and then alone.
        p: McNemar's exact two-sided test.
        kept: share of items with the same answer, right or wrong; a reply of which nothing could
            be made is its own answer.
    """

    n: int
    difference: Metric
    better: int
    worse: int
    p: float
    kept: float


@dataclass(frozen=True)
class Together:
    """Items that belong together.

    Attributes:
        same: share of groups of one meaning (paraphrases, orders of choices) that got one answer.
        flipped: share of flip pairs that got different answers.
        all_right: share of groups in which every answer is right (MME's acc+ over an image).
        groups: by relation.
    """

    same: float | None
    flipped: float | None
    all_right: float | None
    groups: Mapping[str, int]


def cell(items: Mapping[str, Item], outcomes: Sequence[Outcome]) -> Cell:
    """The numbers of some outcomes of one client and style."""
    answered = [o for o in outcomes if not o.error]
    failed = len(outcomes) - len(answered)
    if not answered:
        return Cell(None, failed, None)
    polar = [o for o in answered if items[o.item].kind == "yes-no"]
    counts = {
        (truth, said): sum(_truth(items[o.item]) == truth and o.answer == said for o in polar)
        for truth in (YES, NO)
        for said in (YES, NO, None)
    }
    hit, said_yes = counts[YES, YES], counts[YES, YES] + counts[NO, YES]
    real = sum(counts[YES, said] for said in (YES, NO, None))
    precision = hit / said_yes if said_yes else None
    recall = hit / real if real else None
    f1 = 2 * hit / (said_yes + real) if said_yes + real else None
    return Cell(
        accuracy=_accuracy(items, answered, np.array([[o.right] for o in answered], dtype=float)),
        failed=failed,
        unparsed=sum(o.answer is None for o in answered) / len(answered),
        yes=said_yes / len(polar) if polar else None,
        precision=precision,
        recall=recall,
        f1=f1 if polar else None,
        errors=_mean([o.errors for o in answered]),
        likeness=_mean([o.likeness for o in answered]),
        contradictions=_mean([o.contradicts for o in answered]),
    )


def pope_cell(items: Mapping[str, Item], outcomes: Sequence[Outcome]) -> Cell:
    """The numbers of yes-no questions with replies read by POPE's own parser (`popes`).

    It reads a reply from its beginning, whatever comes last, and makes something of every one.
    """
    read = []
    for outcome in outcomes:
        item = items[outcome.item]
        if item.kind == "yes-no":
            said = None if outcome.error else popes(item, outcome.reply)
            right = None if said is None else int(said == _truth(item))
            read.append(replace(outcome, answer=said, right=right))
    return cell(items, read)


def paired(
    items: Mapping[str, Item], outcomes: Sequence[Outcome], simple: Sequence[Outcome]
) -> Paired | None:
    """A style, or a model after an edit, against another, on the items of both."""
    then = {o.item: o for o in simple if not o.error}
    both = [o for o in outcomes if not o.error and o.item in then]
    if not both:
        return None
    now = np.array([[o.right] for o in both], dtype=float)
    before = np.array([[then[o.item].right] for o in both], dtype=float)
    better = int(((now == 1) & (before == 0)).sum())
    worse = int(((now == 0) & (before == 1)).sum())
    difference = _accuracy(items, both, now, before)
    kept = sum(_said(o) == _said(then[o.item]) for o in both) / len(both)
    return Paired(len(both), difference, better, worse, mcnemar(better, worse), kept)


def together(items: Mapping[str, Item], outcomes: Sequence[Outcome]) -> Together:
    """What the answers to items of one pair_id have to do with each other."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        pair = items[outcome.item].pair_id
        if pair and not outcome.error:
            groups.setdefault(pair, []).append(outcome)
    whole = [group for group in groups.values() if len(group) > 1]

    def share(relation: str, holds: Callable[[list[Outcome]], bool]) -> float | None:
        of = [g for g in whole if not relation or items[g[0].item].relation == relation]
        return sum(map(holds, of)) / len(of) if of else None

    return Together(
        same=share("same", lambda g: len({o.answer for o in g}) == 1 and g[0].answer is not None),
        flipped=share("flip", lambda g: len({o.answer for o in g}) == len(g)),
        all_right=share("", lambda g: all(o.right for o in g)),
        groups={
            name: sum(items[g[0].item].relation == name for g in whole) for name in ("same", "flip")
        },
    )


def mcnemar(better: int, worse: int) -> float:
    """The exact two-sided p of so many changes in either direction, were both as likely."""
    n = better + worse
    if n == 0:
        return 1.0
    tail = sum(comb(n, k) for k in range(min(better, worse) + 1)) / 2**n
    return min(1.0, 2 * tail)


def _said(outcome: Outcome) -> str:
    return outcome.reply if outcome.answer is None else outcome.answer


def _truth(item: Item) -> str:
    return item.answer.strip().lower()


def _accuracy(
    items: Mapping[str, Item],
    outcomes: Sequence[Outcome],
    right: np.ndarray,
    minus: np.ndarray | None = None,
) -> Metric:
    keys = [items[o.item].images or (o.item,) for o in outcomes]
    found = mean_metrics(["accuracy"], right, cluster_numbers(keys), RESAMPLES, minus)
    return found["accuracy"]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None
