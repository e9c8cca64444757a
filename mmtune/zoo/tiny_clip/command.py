"""What the recipes share: the options of their command lines, how a run begins, what it reports."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mmtune.field_options import add_field_options

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mmtune.zoo.tiny_clip.material import Material


class Seeded(Protocol):
    """What a recipe has at least."""

    @property
    def seed(self) -> int:
        """Of everything that is drawn."""
        ...


def recipe_parser(
    module: str, description: str | None, recipe: type, teachers: bool = True
) -> argparse.ArgumentParser:
    """A parser of --out, --icons, --device, and every number of the recipe.

    Args:
        module: that is run.
        description: what --help says.
        recipe: a dataclass.
        teachers: whether the recipe has any, which --teachers names.
    """
    import torch

    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    if teachers:
        text = "unpacked teacher packages"
        parser.add_argument("--teachers", type=Path, required=True, help=text)
    parser.add_argument("--icons", type=Path, help="unpacked icon packages: further pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_field_options(parser, recipe)
    return parser


def begin(recipe: Seeded, device: torch.device) -> torch.Generator:
    """Seed a training run; the generator of what it draws on the device."""
    import torch

    torch.manual_seed(recipe.seed)
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
    return torch.Generator(device=device).manual_seed(recipe.seed)


def facts(model: nn.Module, data: Material, began: float) -> dict[str, Any]:
    """Sizes and seconds of a run that began at `began` (`time.time`), for metrics.json."""
    import torch

    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_pairs": {"clipart": data.clipart, "icons": len(data.mirror) - data.clipart},
        "seconds": round(time.time() - began),
        "torch": torch.__version__,
    }
