"""Probes of multimodal models, and measurements of training steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.run_listing.base import (
    CONFIG,
    Number,
    Reader,
    Run,
    made_with,
    read_json,
    read_lines,
    there,
)

if TYPE_CHECKING:
    from mmtune.probe.items import Item


class Probe(Reader):
    """What `mmtune probe` writes: a line a reply; its page comes last."""

    kind = "probe"
    interval = "95 % bootstrap interval over images"

    def claims(self, folder: Path, config: Mapping[str, Any]) -> bool:
        return "models" in config and "styles" in config

    def read(self, folder: Path, config: Mapping[str, Any], name: str) -> list[Run]:
        replies = folder / "replies.jsonl"
        lines = read_lines(replies)
        report = there(folder / "report.html")
        good = [line for line in lines if not line["error"]]
        pairs = {(line["client"], line["style"]) for line in good}
        silent = [m for m in config["models"] if not any(m == model for model, _ in pairs)]
        bad = len(lines) - len(good)
        late = report is None or report.stat().st_mtime < replies.stat().st_mtime
        why = f"{bad:,} requests failed" if bad else ""
        if silent:
            why = ", ".join(filter(None, [why, f"no reply yet of {', '.join(silent)}"]))
        done = not (why or late)
        run = self.run(
            folder,
            name,
            "finished" if done else "unfinished",
            why="" if done else f"{why or f'{len(good):,} replies'}; the same command goes on",
            numbers=self._numbers(folder, config, good),
            report=report,
            config=config,
        )
        return [run]

    def _numbers(
        self, folder: Path, config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]
    ) -> list[Number]:
        """Accuracy of each model and style; without the items, an interval is not known."""
        from mmtune.probe.outcomes import Outcome
        from mmtune.probe.scores import cell

        items = self._items(folder, config)
        found = []
        for style in config["styles"]:
            for model in config["models"]:
                own = [x for x in lines if (x["client"], x["style"]) == (model, style)]
                if not own:
                    continue
                what = f"{style} accuracy"
                known = all(line["item"] in items for line in own)
                metric = cell(items, [Outcome(**x) for x in own]).accuracy if known else None
                if metric is None:
                    share = sum(line["right"] for line in own) / len(own)
                    found.append(Number(what, 100 * share, of=model, unit="%"))
                else:
                    ends = (100 * metric.low, 100 * metric.high)
                    found.append(Number(what, 100 * metric.value, *ends, model, unit="%"))
        return found

    @staticmethod
    def _items(folder: Path, config: Mapping[str, Any]) -> dict[str, Item]:
        """Id -> item; empty where the items are not at hand any more."""
        from mmtune.probe.config import load_probe_config
        from mmtune.probe.running import ITEMS, items_of

        made = config["items"].get("format") == "made"
        if made and not (folder / ITEMS / "items.jsonl").exists():
            return {}  # they would be made again
        try:
            read = items_of(load_probe_config(folder / CONFIG), folder)
        except (OSError, ValueError, RuntimeError):
            return {}
        return {item.id: item for item in read.items}


class Bench(Reader):
    """What `mmtune bench` writes: several measurements share a folder, NAME.json comes later."""

    kind = "bench"
    interval = "quartiles of the steps"

    def claims(self, folder: Path, config: Mapping[str, Any]) -> bool:
        return not config and any(self._is_bench(path) for path in folder.glob("*.jsonl"))

    @staticmethod
    def _is_bench(path: Path) -> bool:
        try:
            with path.open(encoding="utf-8") as file:
                first = json.loads(file.readline())
            return {"name", "setting", "step"} <= first.keys()
        except (OSError, ValueError, AttributeError):
            return False

    def read(self, folder: Path, config: Mapping[str, Any], name: str) -> list[Run]:
        files = sorted(path for path in folder.glob("*.jsonl") if self._is_bench(path))
        return [self._run(path, f"{name}/{path.stem}") for path in files]

    def _run(self, path: Path, name: str) -> Run:
        lines = read_lines(path)
        about = path.with_suffix(".json")
        errors = [line["name"] for line in lines if line["step"] is None]
        measured = [line for line in lines if line["step"] is not None]
        trained = next((x for x in measured if x["trainable"]), None)
        why = f"not measured: {', '.join(errors)}" if errors else ""
        if not about.exists():
            why = f"{len(lines)} contestants are measured; the same command begins again"
        numbers = [
            Number("step", t["median"], t["low"], t["high"], line["name"], unit="ms")
            for line in sorted(measured, key=lambda line: line is not trained)
            for t in [line["step"]]
        ]
        return Run(
            self.kind,
            name,
            path.parent,
            "finished" if about.exists() else "unfinished",
            why,
            numbers,
            trained["trainable"] if trained else None,
            **made_with(read_json(about) if about.exists() else {}),
            report=there(path.with_suffix(".md")),
            config=lines[0]["setting"],
        )
