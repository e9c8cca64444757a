"""The arguments of `mmtune bench`, and what it shows."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from mmtune.shown import Findings


def add_commands(new: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the command; `new` makes the parser of a command from its name and summary.

    The parsed options have `show`, which takes them and returns `Findings`.
    """
    bench = new("bench", "measure training steps of every method beside the floor and PEFT's LoRA")
    bench.add_argument("subject", help="clip-l-14, tiny-clip, …; another word lists them")
    bench.add_argument("--methods", nargs="+", metavar="NAME", help="default: all")
    bench.add_argument("--batch", type=int, help="samples of a step (default: the subject's)")
    bench.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the base's weights")
    bench.add_argument("--device", choices=("cuda", "cpu"), help="default: CUDA if there is one")
    bench.add_argument("--compiled", action="store_true", help="through torch.compile")
    bench.add_argument("--checkpointing", action="store_true", help="recompute layers")
    bench.add_argument("--cuda-graphs", action="store_true", help="record passes and replay them")
    bench.add_argument("--runs", type=int, default=20, help="steps measured (default: 20)")
    bench.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder to write")
    bench.set_defaults(show=_bench)


def _bench(options: argparse.Namespace) -> Findings:
    import torch

    from mmtune.bench.contestants import contestants
    from mmtune.bench.running import run
    from mmtune.bench.steps import Setting
    from mmtune.bench.tables import COLUMNS, rows
    from mmtune.tables import new_table

    if options.runs < 1 or (options.batch is not None and options.batch < 1):
        given = f"{options.runs} and {options.batch}"
        raise ValueError(f"--runs and --batch must be 1 or more, got {given}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    setting = Setting(
        subject=options.subject,
        batch=options.batch,
        dtype=options.dtype or ("bfloat16" if device == "cuda" else "float32"),
        device=device,
        compiled=options.compiled,
        checkpointing=options.checkpointing,
        cuda_graphs=options.cuda_graphs,
        runs=options.runs,
    )
    lines = run(setting, options.methods or list(contestants()), options.out)
    table = new_table(*COLUMNS, right=True)
    for row in rows(lines):
        table.add_row(*row)
    failed = any(line.step is None for line in lines)
    return Findings([table], [f"lines and picture: {options.out}"], int(failed), wide=True)
