"""The report of a run: one HTML file that needs nothing else, and the same as markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmtune.runs import Results
    from mmtune.tasks.base import GalleryItem


@dataclass(frozen=True)
class Report:
    """What a report shows.

    Attributes:
        title: the run's name.
        summary: one line below it.
        results: the numbers of the table.
        primary: the metric that the headline shows.
        log: lines of metrics.jsonl.
        gallery: queries whose results changed.
        config: the resolved config, as YAML text.
        manifest: versions, seed, data hashes, commit.
    """

    title: str
    summary: str
    results: Results
    primary: str
    log: Sequence[Mapping[str, Any]]
    gallery: Sequence[GalleryItem]
    config: str
    manifest: Mapping[str, Any]


def write_report(report: Report, folder: Path) -> Path:
    """Write report.html and report.md into `folder`. Returns the path of the HTML file."""
    from mmtune.report.html import render_html
    from mmtune.report.markdown import render_markdown
    from mmtune.runs import write_text

    write_text(folder / "report.md", render_markdown(report))
    write_text(folder / "report.html", render_html(report))
    return folder / "report.html"
