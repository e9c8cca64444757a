"""The fields of a dataclass as options of a command line."""

from __future__ import annotations

import argparse
import dataclasses


def add_field_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """Give a parser an option for every field: of its default's type, and with that default."""
    for field in dataclasses.fields(settings):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=type(field.default), default=field.default)
