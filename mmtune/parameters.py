"""Which parameters an adapter trains: counted by branch and by role of the site they sit on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from mmtune.backbones.base import Site

# What PEFT puts before the path of a module inside the stock model.
_PREFIXES = ("base_model.model.", "base_model.")
_NUMBER = re.compile(r"_\d+(?=[._])")


@dataclass(frozen=True)
class ParameterGroup:
    """Trainable parameters of one branch and role; `tensors` counts tensors, `count` numbers."""

    branch: str
    role: str
    tensors: int
    count: int


def parameter_groups(model: nn.Module, sites: Sequence[Site]) -> list[ParameterGroup]:
    """Group the trainable parameters of a wrapped model by the sites they sit on.

    Args:
        model: the PeftModel.
        sites: those of the prepared backbone, listed before it was wrapped.

    Returns:
        Groups in the order of the model; what sits on no site is in the branch "shared", with its
        tensor's name as role, in which the number of a layer is "*".
    """
    paths = {site.path: site for site in sites}
    groups: dict[tuple[str, str], list[int]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            path = next((name.removeprefix(p) for p in _PREFIXES if name.startswith(p)), name)
            site = _site_of(path, paths)
            key = (site.branch, site.role) if site else ("shared", _NUMBER.sub("_*", path))
            groups.setdefault(key, []).append(parameter.numel())
    return [ParameterGroup(*key, len(sizes), sum(sizes)) for key, sizes in groups.items()]


def counts(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters, and all; of a weight packed in four bits, the numbers it stands for."""
    packed = [(getattr(p, "quant_state", None), p) for p in model.parameters()]
    sizes = [((p if q is None else q).shape.numel(), p.requires_grad) for q, p in packed]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def _site_of(path: str, paths: dict[str, Site]) -> Site | None:
    """The innermost site whose module path is a prefix of a parameter's path."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if (site := paths.get(".".join(parts[:end]))) is not None:
            return site
    return None
