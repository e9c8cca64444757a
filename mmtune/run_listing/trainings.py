"""Fine-tuning runs, comparisons of methods, and trainings of editors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtune.run_listing.base import (
    RESULTS,
    BrokenRunError,
    Number,
    Reader,
    Run,
    losses,
    made_with,
    number_of,
    read_json,
    read_lines,
    read_yaml,
    there,
)

METRICS = "metrics.jsonl"


def stopped(lines: Sequence[Mapping[str, Any]]) -> str:
    """Where an unfinished training is, and how it goes on."""
    at = f"step {lines[-1]['step']:,} is logged" if lines else "no step is logged"
    return f"{at}; the same command with --resume goes on"


class Training(Reader):
    """What `mmtune train` writes: results.json comes last, beside an adapter."""

    kind = "train"

    def claims(self, folder: Path, config: Mapping[str, Any]) -> bool:
        return "tuner" in config and "task" in config

    def read(self, folder: Path, config: Mapping[str, Any], name: str) -> list[Run]:
        log = read_lines(folder / METRICS)
        facts: dict[str, Any] = {
            "config": config,
            "curve": losses(log),
            "objective": str(config["task"]["name"]),
            "report": there(folder / "report.html"),
        }
        if not (folder / RESULTS).exists():
            return [self.run(folder, name, "unfinished", why=stopped(log), **facts)]
        results = read_json(folder / RESULTS)
        if not (folder / "adapter").is_dir():
            raise BrokenRunError(f"{RESULTS} is there, and adapter/ is missing")
        run = self.run(
            folder,
            name,
            "finished",
            numbers=self._numbers(results),
            trainable=results["trainable"],
            seconds=results["seconds"],
            **facts,
        )
        return [run]

    @staticmethod
    def _numbers(results: Mapping[str, Any]) -> list[Number]:
        """The primary metric, how it changed, and the others."""
        after, difference = results["after"], results["difference"]
        first = results.get("primary") or next(iter(after), "")
        found = []
        for name in sorted(after, key=lambda name: name != first):
            found.append(number_of(name, after[name]))
            if name in difference:
                found.append(number_of(f"{name}, change", difference[name], form="+.1f"))
        return found


class Comparison(Reader):
    """What `mmtune compare` writes: a line a cell in results.jsonl, the base beside it."""

    kind = "compare"
    interval = "t-interval over seeds"

    def claims(self, folder: Path, config: Mapping[str, Any]) -> bool:
        return (folder / "compare.yaml").is_file()

    def read(self, folder: Path, config: Mapping[str, Any], name: str) -> list[Run]:
        document = read_yaml(folder / "compare.yaml")
        cells = read_lines(folder / "results.jsonl")
        base = read_json(path) if (path := folder / "base-test.json").exists() else {}
        done = [cell for cell in cells if cell["status"] == "done"]
        wanted = len(document["methods"]) * len(document.get("seeds", [0]))
        failed = [cell for cell in cells if cell["status"] == "failed"]
        why = "" if len(done) == wanted else f"{len(done)} of {wanted} cells are done"
        if failed:
            first = f"{Path(failed[0]['folder']).name}: {failed[0]['error']}"
            why += f", {len(failed)} failed ({first})"
        numbers = self._numbers(done, str(base.get("primary", "")))
        best = numbers[0].of if numbers else ""
        run = Run(
            self.kind,
            name,
            folder,
            "finished" if len(done) == wanted else "unfinished",
            f"{why}; the same command goes on" if why else "",
            numbers,
            next((cell["trainable"] for cell in done if cell["method"] == best), None),
            sum(cell["seconds"] for cell in done) if done else None,
            **made_with(base.get("manifest", {})),
            report=there(folder / "compare.html"),
            config=document,
        )
        return [run]

    @staticmethod
    def _numbers(done: Sequence[Mapping[str, Any]], primary: str) -> list[Number]:
        """Each method's mean of each metric over seeds; first that of the best method."""
        from mmtune.metrics.seeds import over_seeds

        found = []
        for method in dict.fromkeys(cell["method"] for cell in done):
            own = [cell["metrics"] for cell in done if cell["method"] == method]
            for metric in own[0]:
                mean = over_seeds([values[metric] for values in own])
                ends = (None, None)
                if mean.half is not None:
                    ends = (mean.value - mean.half, mean.value + mean.half)
                found.append(Number(metric, mean.value, *ends, of=method))
        quoted = [n for n in found if n.what == (primary or found[0].what)]
        if not quoted:
            return found
        best = max(quoted, key=lambda n: n.value)
        return [best, *(n for n in found if n is not best)]


class EditorTraining(Reader):
    """What `mmtune edit-train` writes: results.json comes last, beside the trained editor."""

    kind = "edit-train"
    interval = ""

    def claims(self, folder: Path, config: Mapping[str, Any]) -> bool:
        return "editor" in config and "training" in config

    def read(self, folder: Path, config: Mapping[str, Any], name: str) -> list[Run]:
        log = read_lines(folder / METRICS)
        facts: dict[str, Any] = {
            "config": config,
            "curve": losses(log),
            "objective": f"editor {config['editor']['name']}",
            "report": there(folder / "report.html"),
        }
        if not (folder / RESULTS).exists():
            return [self.run(folder, name, "unfinished", why=stopped(log), **facts)]
        results = read_json(folder / RESULTS)
        if not (folder / "trained").is_dir():
            raise BrokenRunError(f"{RESULTS} is there, and trained/ is missing")
        validation = dict(results["validation"])
        first = {"success": validation.pop("success")} if "success" in validation else {}
        numbers = [
            *(Number("success", 100 * value, unit="%") for value in first.values()),
            *(Number(f"validation {key}", value, form=".4g") for key, value in validation.items()),
        ]
        run = self.run(
            folder,
            name,
            "finished",
            numbers=numbers,
            trainable=results["parameters"],
            seconds=results["seconds"],
            **facts,
        )
        return [run]
