"""The report as one HTML file: no scripts, no other files, light and dark, phone and desk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmtune.report.numbers import facts, interval, rows, sign, with_interval
from mmtune.report.pictures import Pictures, is_wide
from mmtune.report.plots import training_curves

if TYPE_CHECKING:
    from mmtune.report import Report
    from mmtune.tasks.base import GalleryItem, Shown


def render_html(report: Report) -> str:
    """The report's page."""
    pictures = Pictures()
    gallery = [_item(item, pictures) for item in report.gallery]
    return fill(
        "template.html",
        report=report,
        headline=_headline(report),
        rows=rows(report.results),
        facts=facts(report.results),
        queries=max((m.n for m in report.results.after.values()), default=0),
        curves=training_curves(report.log),
        gallery=gallery,
        left_out=pictures.left_out,
        config=report.config,
        manifest=report.manifest,
    )


def fill(template: str, **values: Any) -> str:
    """Fill a template of this folder. Texts of the data are escaped by jinja2."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mmtune", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(template).render(**values)


def _headline(report: Report) -> dict[str, Any] | None:
    name, results = report.primary, report.results
    if name not in results.before or name not in results.difference:
        return None
    difference = results.difference[name]
    return {
        "name": name,
        "before": f"{results.before[name].value:.1f}",
        "after": f"{results.after[name].value:.1f}",
        "detail": with_interval(results.after[name]),
        "difference": f"{difference.value:+.1f}",
        "interval": interval(difference, "+"),
        "sign": sign(name, difference),
    }


def _item(item: GalleryItem, pictures: Pictures) -> dict[str, Any]:
    return {
        "title": item.title,
        "query": _cell(item.query, pictures),
        "lists": [
            ("before", [_cell(cell, pictures) for cell in item.before]),
            ("after", [_cell(cell, pictures) for cell in item.after]),
        ],
    }


def _cell(cell: Shown, pictures: Pictures) -> dict[str, Any]:
    frame = {None: "", True: "right", False: "wrong"}[cell.correct]
    uri = pictures.uri(cell.image) if cell.image is not None else ""
    wide = cell.image is not None and is_wide(cell.image)
    return {"uri": uri, "text": cell.text, "frame": frame, "wide": wide}
