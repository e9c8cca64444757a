"""Modules run in a process of their own, which forks: the start of Python and torch is slow."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from mmtune.device import leave_together

ROOT = Path(__file__).parent.parent.parent


def run_module(module, folder):
    """`python -m MODULE FOLDER`, which must end well; what it wrote to stderr."""
    command = [sys.executable, "-m", module, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def forked(work, *arguments):
    """The id of a child that does the work and exits with 0."""
    child = os.fork()
    if child:
        return child
    try:
        work(*arguments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_group(work, folder, world=2):
    """Do work(rank, folder) in every process of a gloo group; how each of them ended."""
    torch.set_num_threads(1)  # a fork has no other threads
    return [
        status(child) for child in [forked(_join, work, r, world, folder) for r in range(world)]
    ]


def _join(work, rank, world, folder):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    work(rank, folder)
    leave_together()
