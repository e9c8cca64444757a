"""Results and samples in lmms-eval's layouts, for tools that read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.probe.scores import OVERALL, Cell
from mmtune.runs import write_json, write_text

if TYPE_CHECKING:
    from mmtune.probe.running import Probed


def write_lmms_eval(
    probed: Probed, cells: Mapping[tuple[str, str, str], Cell], out: Path
) -> list[Path]:
    """Write MODEL_results.json and MODEL_samples_TASK_STYLE.jsonl for every model.

    Args:
        probed: what was found.
        cells: (model, style, category) -> its numbers.
        out: folder to write.

    Returns:
        the files.
    """
    out.mkdir(parents=True, exist_ok=True)
    known = {item.id: item for item in probed.items.items}
    files = []
    for model in probed.config.models:
        results: dict[str, Any] = {}
        for style in probed.config.styles:
            task = f"{probed.items.name}_{style}"
            cell = cells[model, style, OVERALL]
            accuracy = cell.accuracy
            error = None if accuracy is None else (accuracy.high - accuracy.low) / (2 * 1.96)
            results[task] = {
                "alias": task,
                "accuracy,none": None if accuracy is None else accuracy.value,
                "accuracy_stderr,none": error,
            }
            lines = [
                {
                    "doc_id": number,
                    "doc": known[o.item].as_json(),
                    "target": known[o.item].answer,
                    "arguments": {"0": o.text},
                    "resps": [[o.reply]],
                    "filtered_resps": [o.answer],
                    "accuracy": o.right,
                    "error": o.error,
                }
                for number, o in enumerate(probed.of(model, style))
            ]
            files.append(out / f"{model}_samples_{task}.jsonl")
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_text(files[-1], text)
        counts = {
            task: {
                "original": len(probed.items.items),
                "effective": len(probed.of(model, task.rpartition("_")[2])),
            }
            for task in results
        }
        document = {
            "results": results,
            "configs": {task: {"task": task, "parser": "by kind of item"} for task in results},
            "n-samples": counts,
            "model_name": model,
        }
        files.append(out / f"{model}_results.json")
        write_json(files[-1], document)
    return files
