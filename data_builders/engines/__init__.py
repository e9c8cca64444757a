"""Where the stages of a build run: processes of this machine, or Ray Data."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_builders.config import EngineOptions
    from data_builders.engines.base import Engine


def engine_of(options: EngineOptions, device: str) -> Engine:
    """The engine that a config names.

    Args:
        options: its section of the config.
        device: "auto", "cpu" or "cuda", as the model's section says.

    Raises:
        RunError: Ray is asked for and not installed.
    """
    if options.kind == "ray":
        from data_builders.engines.ray import RayEngine

        return RayEngine(options, device)
    from data_builders.engines.local import LocalEngine

    return LocalEngine(options, device)
