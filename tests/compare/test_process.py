"""Calls in a process of their own: values, errors and sudden deaths."""

from __future__ import annotations

import os
import signal
import sys

from mmtune.compare.process import call_apart, call_here


def double(x):
    sys.stdout.write(f"doubling {x}\n")
    sys.stderr.write("and to stderr\n")
    return 2 * x, os.getpid()


def refuse():
    raise KeyError("first line\nsecond line")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def leave():
    os._exit(3)


def test_value_comes_back_from_another_process_and_its_output_is_kept(tmp_path):
    seen = []
    ended = call_apart(double, (21,), tmp_path / "out.txt", watch=lambda: seen.append(1))
    assert ended.error is None
    assert ended.value[0] == 42
    assert ended.value[1] != os.getpid()
    text = (tmp_path / "out.txt").read_text()
    assert "doubling 21\n" in text
    assert "and to stderr\n" in text


def test_error_comes_back_with_its_traceback(tmp_path):
    ended = call_apart(refuse, (), tmp_path / "out.txt")
    assert ended.error is not None
    assert ended.error.startswith("KeyError: ")
    assert "in refuse" in ended.traceback


def test_a_call_in_this_process_gives_the_same(tmp_path):
    ended = call_here(double, (21,), tmp_path / "out.txt")
    assert ended.value == (42, os.getpid())
    assert (tmp_path / "out.txt").read_text() == "doubling 21\nand to stderr\n"
    here = call_here(refuse, (), tmp_path / "out.txt")
    apart = call_apart(refuse, (), tmp_path / "out.txt")
    assert here.error == apart.error
    assert "in refuse" in here.traceback


def test_deaths_are_named(tmp_path):
    assert call_apart(die, (), tmp_path / "out.txt").error == (
        "its process was killed by SIGKILL (out of memory?)"
    )
    assert call_apart(leave, (), tmp_path / "out.txt").error == (
        "its process ended with exit code 3 and no result"
    )
