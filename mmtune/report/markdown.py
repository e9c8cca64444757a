"""Markdown, for a terminal or a pull request: the report of a run, and any table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmtune.report.numbers import facts, rows

if TYPE_CHECKING:
    from mmtune.report import Report


def render_markdown(report: Report) -> str:
    """Table, costs, config and manifest; pictures are in the HTML report only."""
    queries = max((m.n for m in report.results.after.values()), default=0)
    lines = [
        f"# {report.title}",
        "",
        report.summary,
        "",
        "| metric | before | after | difference |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {r.name} | {r.before} | {r.after} | {r.difference} {r.interval} |"
        for r in rows(report.results)
    ]
    lines += [
        "",
        f"{report.results.split} split, up to {queries:,} queries; brackets hold 95 % intervals, "
        "those of differences are paired.",
        "",
    ]
    lines += [f"- {f.label}: {f.value} ({f.detail})" for f in facts(report.results)]
    lines += ["", "## Config", "", "```yaml", report.config.rstrip(), "```", ""]
    lines += ["## Made with", ""]
    lines += [f"- {key}: {value}" for key, value in _flat(report.manifest)]
    return "\n".join(lines) + "\n"


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table whose columns but the first are aligned to the right."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    return [line(header), "|---" + "|---:" * (len(header) - 1) + "|", *map(line, rows)]


def _flat(manifest: object, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(manifest, dict):
        return [
            pair
            for key, value in manifest.items()
            for pair in _flat(value, f"{prefix} {key}".strip())
        ]
    return [(prefix, str(manifest))]
