"""`python -m mmtune.probe.made`: write the built-in probe set."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from mmtune.probe.made.writing import write

log = logging.getLogger(__name__)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m mmtune.probe.made", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--each", type=int, default=12, help="questions of a kind (default: 12)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found = write(given.out, given.each, given.seed)
    log.info("%d items: %s", len(found.items), given.out / "items.jsonl")


if __name__ == "__main__":
    main()
