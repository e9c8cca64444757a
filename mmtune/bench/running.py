"""`mmtune bench`: measures, and writes each line as soon as it is known."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mmtune.bench.steps import Line, Setting, measured
from mmtune.bench.tables import COLUMNS, bars, rows
from mmtune.report.markdown import table_lines
from mmtune.runs import manifest, write_json, write_text


def run(setting: Setting, names: Sequence[str], out: Path) -> list[Line]:
    """Measure; write NAME.jsonl as lines become known, then NAME.md, NAME.svg and NAME.json.

    NAME says the subject and how it was run, so that several runs share a folder.
    """
    from tqdm import tqdm

    kind = [setting.subject, setting.device]
    ways = ("compiled", "checkpointing", "cuda_graphs")
    kind += [way.replace("_", "-") for way in ways if getattr(setting, way)]
    path = out / "-".join(kind)
    out.mkdir(parents=True, exist_ok=True)
    lines: list[Line] = []
    with (out / f"{path.name}.jsonl").open("w", encoding="utf-8") as file:
        for line in tqdm(measured(setting, names), total=len(names), unit="contestant"):
            lines.append(line)
            file.write(json.dumps(line.as_json()) + "\n")
            file.flush()
    write_json(out / f"{path.name}.json", manifest(setting.seed, setting.device, [], sys.argv))
    write_text(out / f"{path.name}.md", "\n".join(table_lines(COLUMNS, rows(lines))) + "\n")
    write_text(out / f"{path.name}.svg", bars(lines))
    return lines
