"""The numbers of a probe as tables that a terminal, markdown and a page can show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmtune.probe.scores import OVERALL, Cell, Paired, Together, cell, paired, pope_cell, together

if TYPE_CHECKING:
    from mmtune.probe.running import Probed
    from mmtune.tasks.base import Metric

NOTHING, KEPT = "", "answers kept, %"
Key = tuple[str, str, str]  # model, style, category


@dataclass(frozen=True)
class Numbers:
    """Everything that is counted.

    Attributes:
        cells: of each model, style and category, and of all categories together.
        styles: (model, style) -> the style against "simple" of the same model.
        changed: (model, style, category) -> the model against the first one.
        together: (model, style) -> what items of a pair have to do with each other.
        categories: in the order of the items.
        pope: (model, style) -> as POPE's own script counts; empty for items in another format.
    """

    cells: Mapping[Key, Cell]
    styles: Mapping[tuple[str, str], Paired]
    changed: Mapping[Key, Paired]
    together: Mapping[tuple[str, str], Together]
    categories: Sequence[str]
    pope: Mapping[tuple[str, str], Cell]


def numbers_of(probed: Probed) -> Numbers:
    """Count."""
    items = {item.id: item for item in probed.items.items}
    categories = list(dict.fromkeys(item.category for item in probed.items.items))
    asked = probed.config.styles
    cells: dict[Key, Cell] = {}
    changed: dict[Key, Paired] = {}
    styles, pairs, pope = {}, {}, {}
    first = next(iter(probed.config.models))
    for model in probed.config.models:
        for style in asked:
            outcomes = probed.of(model, style)
            for category in (OVERALL, *categories):
                key = model, style, category
                some = [o for o in outcomes if category in (OVERALL, items[o.item].category)]
                cells[key] = cell(items, some)
                if model != first and (found := paired(items, some, probed.of(first, style))):
                    changed[key] = found
            pairs[model, style] = together(items, outcomes)
            if probed.config.items.format == "pope":
                pope[model, style] = pope_cell(items, outcomes)
            if style != "simple" and "simple" in asked:
                found = paired(items, outcomes, probed.of(model, "simple"))
                styles |= {(model, style): found} if found else {}
    return Numbers(cells, styles, changed, pairs, categories, pope)


def accuracy_rows(probed: Probed, numbers: Numbers) -> tuple[list[str], list[list[str]]]:
    """Style x category: accuracy in percent with its interval, n below."""
    header = ["model", "style", OVERALL, *numbers.categories]
    rows = []
    for model in probed.config.models:
        for style in probed.config.styles:
            cells = [numbers.cells[model, style, c] for c in (OVERALL, *numbers.categories)]
            rows.append([model, style, *[_accuracy(one.accuracy) for one in cells]])
    return header, rows


def difference_rows(numbers: Numbers) -> tuple[list[str], list[list[str]]]:
    """What each style changes against "simple" on the same items, by McNemar's test."""
    header = ["model", "style", "n", "difference", "right in it alone", "in simple alone", "p"]
    rows = [[model, style, *_paired(found)] for (model, style), found in numbers.styles.items()]
    return [*header, KEPT], rows


def effect_rows(probed: Probed, numbers: Numbers) -> tuple[list[str], list[list[str]]]:
    """What a fine-tune or an edit changed elsewhere: each model against the first one.

    All items in every style, and the categories in the plain one ("simple", or the first where that
    was not asked); `Numbers.changed` has the rest.
    """
    first, styles = next(iter(probed.config.models)), probed.config.styles
    plain = "simple" if "simple" in styles else styles[0]
    header = ["model", "style", "category", "n", f"difference to {first}", "gained", "lost", "p"]
    rows = [
        [*key, *_paired(found)]
        for key, found in numbers.changed.items()
        if key[1] == plain or key[2] == OVERALL
    ]
    return [*header, KEPT], rows


def behaviour_rows(probed: Probed, numbers: Numbers) -> tuple[list[str], list[list[str]]]:
    """How models answer apart from being right."""
    header = [
        "model", "style", "n", "failed", "not understood", "yes", "precision", "recall", "F1",
        "same answer", "flipped", "all of a pair right", "CER", "ANLS", "contradicts itself",
    ]  # fmt: skip
    rows = []
    for model in probed.config.models:
        for style in probed.config.styles:
            one, pair = numbers.cells[model, style, OVERALL], numbers.together[model, style]
            shares = [one.unparsed, one.yes, one.precision, one.recall, one.f1]
            shares += [pair.same, pair.flipped, pair.all_right, one.errors, one.likeness]
            n = 0 if one.accuracy is None else one.accuracy.n
            texts = [_percent(share) for share in (*shares, one.contradictions)]
            rows.append([model, style, str(n), str(one.failed), *texts])
    return header, rows


def pope_rows(numbers: Numbers) -> tuple[list[str], list[list[str]]]:
    """POPE's numbers as its own script counts them, to stand beside published ones."""
    header = ["model", "style", "accuracy", "precision", "recall", "F1", "yes"]
    rows = []
    for (model, style), one in numbers.pope.items():
        shares = [_percent(share) for share in (one.precision, one.recall, one.f1, one.yes)]
        rows.append([model, style, _accuracy(one.accuracy), *shares])
    return header, rows


def notes(probed: Probed) -> list[str]:
    """What has to be known to read the tables."""
    found = [
        "Accuracy in percent with 95 % bootstrap intervals over images; a reply of which nothing "
        "could be made counts as wrong, a request that failed does not count.",
        "Differences are paired, over the items that both answered; p is McNemar's exact test, not "
        "corrected for the number of rows. Answers kept are the same, right or wrong.",
        "Parsers: " + "; ".join(sorted({o.parser for o in probed.outcomes if o.parser})) + ".",
    ]
    if probed.config.items.format == "pope":
        found.append(
            "POPE's own script takes a reply for a yes unless its first sentence holds the word no "
            "or not. Published numbers may have been asked for in other words: here the plain "
            'question has "Answer yes or no." behind it.'
        )
    if probed.items.note:
        found.insert(0, f"The set was {probed.items.note}.")
    found += [
        f"{count} of {len(probed.items.items)} items cannot be asked in the style {style}."
        for style, count in probed.left_out.items()
        if count
    ]
    said = sorted({o.note for o in probed.outcomes if o.note})
    return [*found, *(f"Note: {note}." for note in said)]


def _accuracy(metric: Metric | None) -> str:
    if metric is None:
        return NOTHING
    low, high = 100 * metric.low, 100 * metric.high
    return f"{100 * metric.value:.1f} [{low:.1f}, {high:.1f}] n={metric.n}"


def _paired(found: Paired) -> list[str]:
    d = found.difference
    text = f"{100 * d.value:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
    counts = [str(found.better), str(found.worse)]
    return [str(found.n), text, *counts, f"{found.p:.3g}", f"{100 * found.kept:.1f}"]


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f}"
