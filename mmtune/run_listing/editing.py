"""Evaluations of edits, and builds of editing data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtune.run_listing.base import (
    MANIFEST,
    RESULTS,
    Number,
    Reader,
    Run,
    number_of,
    read_json,
    read_lines,
    there,
)

SECONDS = "an edit"
WRITTEN = {"records": "kept", "defects": "defects"}  # as a listing and as a manifest say


class EditEvaluation(Reader):
    """What `mmtune edit` writes: a row for each editor that scored every record."""

    kind = "edit"

    def claims(self, folder: Path, config: Mapping[str, Any]) -> bool:
        return "editors" in config and "protocol" in config

    def read(self, folder: Path, config: Mapping[str, Any], name: str) -> list[Run]:
        file = folder / RESULTS
        results = read_json(file) if file.exists() else {"rows": [], "definitions": {}}
        rows = [row for row in results["rows"] if row["row"] in config["editors"]]
        missing = [n for n in config["editors"] if n not in {row["row"] for row in rows}]
        failed = sum(len(row["failed"]) for row in rows)
        why = f"failed records: {failed:,}" if failed else ""
        if missing:
            scored = [
                f"{n} {len(read_lines(folder / 'editors' / n / 'records.jsonl')):,}"
                for n in missing
            ]
            why = f"records scored: {', '.join(scored)}; the same command goes on"
        run = self.run(
            folder,
            name,
            "unfinished" if missing else "finished",
            why=why,
            numbers=self._numbers(rows, results["definitions"]),
            report=there(folder / "report.html"),
            config=config,
        )
        return [run]

    @staticmethod
    def _numbers(rows: Sequence[Mapping[str, Any]], definitions: Mapping[str, Any]) -> list[Number]:
        """Of each row and kind of metric the definition to quote; the best row's come first.

        The best is the most reliable one; where several are, the first better kind decides.
        """
        counts = len({row["count"] for row in rows}) > 1
        found = []
        for row in rows:
            of = f"{row['row']} after {row['count']:,}" if counts else row["row"]
            own = []
            for kind, by_definition in row["metrics"].items():
                definition, summary = next(iter(by_definition.items()))
                share = definitions.get(definition, {}).get("unit", "share") == "share"
                what = kind.replace("_", " ")
                own.append(number_of(what, summary["macro"], of, percent=share))
            if row["seconds_per_edit"] is not None:
                own.append(Number(SECONDS, row["seconds_per_edit"], of=of, form=".3g", unit="s"))
            found.append(own)
        found.sort(key=lambda own: [-n.value for n in own if n.what != SECONDS])
        return [number for own in found for number in own]


class Build(Reader):
    """What `mmtune build` writes: a folder a step, whose manifest says how it ended."""

    kind = "build"
    interval = ""

    def claims(self, folder: Path, config: Mapping[str, Any]) -> bool:
        return "recipe" in config

    def read(self, folder: Path, config: Mapping[str, Any], name: str) -> list[Run]:
        steps = [read_json(path) for path in sorted(folder.glob(f"stages/*/{MANIFEST}"))]
        ended = {step["stage"]: step["done"] for step in steps if step["done"]}
        finished = "assemble" in ended and (folder / "data").is_dir()
        faults = sum(sum(done["faults"].values()) for done in ended.values())
        why = f"{faults:,} samples were set aside as something is broken" if faults else ""
        if not finished:
            last = f"{', '.join(ended)} ended" if ended else "no step ended"
            why = "; ".join(filter(None, [last, why, "the same command goes on"]))
        numbers = []
        if finished:
            written = ended["assemble"]
            numbers += [Number(k, written[v], form=",.0f") for k, v in WRITTEN.items()]
        numbers += [
            Number("kept", done["kept"], of=step, form=",.0f")
            for step, done in ended.items()
            if step != "assemble"
        ]
        run = self.run(
            folder,
            name,
            "finished" if finished else "unfinished",
            why=why,
            numbers=numbers,
            seconds=sum(step["seconds"] for step in steps) if steps else None,
            report=there(folder / "gallery.html") or there(folder / "README.md"),
            config=config,
        )
        return [run]
