"""A call in a process of its own, which can harm no other, or in this one, which starts faster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# Imported once by the process from which all others are forked; a fresh import takes seconds.
PRELOADED = ["mmtune.training", "mmtune.tuners.registry", "mmtune.tuners.presets"]
POLL = 0.5  # seconds between looks at a running process


@dataclass(frozen=True)
class Ended:
    """How a call ended: with a value, or with an error (its type and text) and its traceback."""

    value: Any = None
    error: str | None = None
    traceback: str = ""


def call_apart(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    output: Path,
    setup: Callable[[], None] | None = None,
    watch: Callable[[], None] = lambda: None,
) -> Ended:
    """Call a function in another process and wait for it.

    The process ends when this one does, however this one ends.

    Args:
        function: a module's function; it, its arguments and its result are pickled in memory.
        arguments: its arguments.
        output: file that receives what the process prints.
        setup: called first in the process.
        watch: called about twice a second while waiting.
    """
    context = _context()
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sending, output, setup, function, arguments))
    process.start()
    sending.close()
    try:
        while not receiving.poll(POLL):
            watch()
        return receiving.recv()
    except EOFError:
        process.join()
        return Ended(error=_death(process.exitcode))
    except BaseException:
        process.terminate()
        raise
    finally:
        receiving.close()
        process.join()


def call_here(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    output: Path,
    setup: Callable[[], None] | None = None,
    watch: Callable[[], None] = lambda: None,
) -> Ended:
    """As `call_apart`, in this process: quicker to start, but what kills the call kills all."""
    watch()
    with output.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        return _ended(function, arguments, setup)


def _ended(
    function: Callable[..., Any], arguments: tuple[Any, ...], setup: Callable[[], None] | None
) -> Ended:
    try:
        if setup is not None:
            setup()
        return Ended(function(*arguments))
    except Exception as error:
        return _failed(error)


def _failed(error: BaseException) -> Ended:
    """How a call ended by the error that is being handled."""
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    return Ended(error=text, traceback=traceback.format_exc())


def _context() -> Any:
    import torch

    # Libraries that are preloaded may touch CUDA, which does not survive a fork.
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    if torch.cuda.is_available() or not forks:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _child(
    sending: Connection,
    output: Path,
    setup: Callable[[], None] | None,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with output.open("w", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    try:
        ended = _ended(function, arguments, setup)
    except KeyboardInterrupt:
        os._exit(130)  # the parent was told by the same key and says so
    except BaseException as error:  # such as SystemExit
        ended = _failed(error)
    sending.send(ended)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"its process was killed by {name}{hint}"
    return f"its process ended with exit code {code} and no result"
