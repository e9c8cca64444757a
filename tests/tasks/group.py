"""Runs a module as the processes of one gloo group."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run_group(module, folder, world=2):
    """`python -m MODULE RANK WORLD FOLDER` for every rank; all must end well."""
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-m", module]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder)],
            cwd=root,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()
