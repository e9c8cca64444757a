"""A probe as one HTML file: heat map, tables, and failures with the pictures that were sent."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.probe.config import to_yaml
from mmtune.probe.scores import OVERALL
from mmtune.probe.styles import STYLES
from mmtune.probe.tables import (
    Numbers,
    accuracy_rows,
    behaviour_rows,
    difference_rows,
    effect_rows,
    notes,
    pope_rows,
)
from mmtune.report.html import fill
from mmtune.report.markdown import table_lines
from mmtune.report.pictures import Pictures
from mmtune.runs import write_text

if TYPE_CHECKING:
    from mmtune.probe.outcomes import Outcome
    from mmtune.probe.running import Probed

PAGE, MARKDOWN = "report.html", "report.md"
SHOWN = 3  # failures of each style and category


def write_pages(probed: Probed, numbers: Numbers, root: Path) -> None:
    """Write report.html and report.md."""
    write_text(root / MARKDOWN, render_markdown(probed, numbers))
    write_text(root / PAGE, render_page(probed, numbers, root))


def tables(probed: Probed, numbers: Numbers) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of the tables that have rows."""
    found = [
        ("Accuracy", *accuracy_rows(probed, numbers)),
        ("What a style changes", *difference_rows(numbers)),
        ("What a model changes", *effect_rows(probed, numbers)),
        ("How they answer", *behaviour_rows(probed, numbers)),
        ("As POPE's own script counts", *pope_rows(numbers)),
    ]
    return [(title, header, rows) for title, header, rows in found if rows]


def render_markdown(probed: Probed, numbers: Numbers) -> str:
    """Tables, notes and config."""
    lines = [f"# {probed.config.name}", ""]
    for title, header, rows in tables(probed, numbers):
        lines += [f"## {title}", "", *table_lines(header, rows), ""]
    lines += [f"- {note}" for note in notes(probed)]
    lines += ["", "## Config", "", "```yaml", to_yaml(probed.config).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def render_page(probed: Probed, numbers: Numbers, root: Path) -> str:
    """The page."""
    pictures = Pictures()
    manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    found = tables(probed, numbers)
    return fill(
        "probe.html",
        title=probed.config.name,
        summary=_summary(probed),
        warning=f"The items were {probed.items.note}." if probed.items.note else "",
        heat=_heat(probed, numbers),
        effects=_effects(probed, numbers),
        first=next(iter(probed.config.models)),
        categories=[OVERALL, *numbers.categories],
        tables=found[1:],
        accuracy=found[0],
        notes=notes(probed),
        gallery=_gallery(probed, pictures),
        shown=SHOWN,
        left_out=pictures.left_out,
        config=to_yaml(probed.config),
        manifest=manifest,
    )


def _summary(probed: Probed) -> str:
    models, styles = len(probed.config.models), len(probed.config.styles)
    return (
        f"{models} model{'s' if models != 1 else ''}, {styles} style{'s' if styles != 1 else ''}, "
        f"{len(probed.items.items)} items of {probed.items.name}"
    )


def _heat(probed: Probed, numbers: Numbers) -> list[dict[str, Any]]:
    """Model by model, rows of cells; `share` colours a cell from wrong (0) to right (100)."""
    found = []
    for model in probed.config.models:
        rows = []
        for style in probed.config.styles:
            cells = []
            for category in (OVERALL, *numbers.categories):
                metric = numbers.cells[model, style, category].accuracy
                value = None if metric is None else 100 * metric.value
                cells.append(
                    {
                        "share": 0 if value is None else round(value),
                        "text": "" if value is None else f"{value:.0f}",
                        "n": 0 if metric is None else metric.n,
                    }
                )
            rows.append((style, cells))
        found.append({"model": model, "rows": rows})
    return found


def _effects(probed: Probed, numbers: Numbers) -> list[dict[str, Any]]:
    """As `_heat`, of differences to the first model; `tone` says which way they go."""
    found = []
    for model in list(probed.config.models)[1:]:
        rows = []
        for style in probed.config.styles:
            cells = []
            for category in (OVERALL, *numbers.categories):
                paired = numbers.changed.get((model, style, category))
                value = 0.0 if paired is None else 100 * paired.difference.value
                cells.append(
                    {
                        "share": min(100, round(2 * abs(value))),
                        "tone": "fell" if value < 0 else "rose",
                        "text": "" if paired is None else _points(value),
                        "kept": 0 if paired is None else f"{100 * paired.kept:.0f}",
                    }
                )
            rows.append((style, cells))
        found.append({"model": model, "rows": rows})
    return found


def _points(value: float) -> str:
    text = f"{value:+.0f}"
    return "0" if float(text) == 0 else text.replace("-", "−")


def _gallery(probed: Probed, pictures: Pictures) -> dict[str, list[dict[str, Any]]]:
    """Style -> failures, a few of each category, models side by side.

    Those at which models differ come first.
    """
    from PIL import Image

    known = {item.id: item for item in probed.items.items}
    by_key: dict[tuple[str, str], dict[str, Outcome]] = {}
    for outcome in probed.outcomes:
        by_key.setdefault((outcome.style, outcome.item), {})[outcome.client] = outcome
    seen: dict[tuple[str, str], int] = {}
    found: dict[str, list[dict[str, Any]]] = {style: [] for style in probed.config.styles}
    for (style, name), outcomes in sorted(by_key.items(), key=lambda one: _agree(one[1])):
        item = known[name]
        key = style, item.category
        if all(o.right for o in outcomes.values()) or seen.get(key, 0) >= SHOWN:
            continue
        sent = STYLES[style](item, probed.items, probed.config.asking)
        if sent is None:
            continue
        seen[key] = seen.get(key, 0) + 1
        images = [Image.open(io.BytesIO(data)) for data in sent.images]
        found[style].append(
            {
                "id": name,
                "category": item.category,
                "uris": [uri for image in images if (uri := pictures.uri(image))],
                "text": sent.text,
                "examples": [f"{e.text} → {e.answer}" for e in sent.examples],
                "answer": item.answer,
                "replies": _replies(list(outcomes.values())),
            }
        )
    return {style: failures for style, failures in found.items() if failures}


def _agree(outcomes: Mapping[str, Outcome]) -> bool:
    return len({bool(o.right) for o in outcomes.values()}) == 1


def _replies(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    return [
        {
            "model": o.client,
            "text": o.error or o.reply or "(nothing)",
            "said": "" if o.answer is None else o.answer,
            "frame": "right" if o.right else "wrong",
        }
        for o in outcomes
    ]
