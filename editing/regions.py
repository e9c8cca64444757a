"""Vision Edit and Language Edit: which parameters of which branch an edit may change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mmtune.backbones.base import SiteError

if TYPE_CHECKING:
    from torch import nn

    from mmtune.backbones.base import Backbone, Site

RegionName = Literal["vision", "language"]


@dataclass(frozen=True)
class Region:
    """Parameters chosen by meaning, as tuners choose their sites.

    Attributes:
        branches: of the backbone.
        sites: roles; None takes the Linears of the MLPs.
        layers: "all", "first:N", "last:N" or indices, within each branch.
        biases: change biases too, not the weights alone.
    """

    branches: tuple[str, ...]
    sites: tuple[str, ...] | None = None
    layers: str | tuple[int, ...] = "all"
    biases: bool = False


MLP = ("fc1", "fc2")
# A name stands for the first of its regions that a model has. Seeing ends where the language model
# begins: at the Q-Former's output, or else at the projector. Source: MMEdit, arXiv 2310.08475,
# whose places are BLIP-2's Q-Former layers 10 and 11 and OPT's layers 29 to 31.
REGIONS: dict[str, tuple[Region, ...]] = {
    "language": (Region(("language",), MLP, "last:3"),),
    "vision": (
        Region(("fusion",), ("fc2",), "last:2"),
        Region(("projector",), ("head",)),
        Region(("vision",), MLP, "last:3"),
    ),
}


def region_of(backbone: Backbone, region: RegionName | Region) -> Region:
    """The region that a name stands for on this model; a region as it is.

    Raises:
        SiteError: an unknown name, or one that stands for nothing here; the message lists what
            there is.
    """
    if isinstance(region, Region):
        return region
    if region not in REGIONS:
        raise SiteError(
            f"no region {region!r}; there are {', '.join(REGIONS)}, or choose branches, sites and "
            f"layers yourself. {_listed(backbone.sites())}"
        )
    sites = backbone.sites()
    for candidate in REGIONS[region]:
        if any(
            s.branch in candidate.branches and s.role in (candidate.sites or MLP) for s in sites
        ):
            return candidate
    raise SiteError(f"{backbone.family} has no place for a {region} edit. {_listed(sites)}")


def parameters_of(backbone: Backbone, region: RegionName | Region) -> dict[str, nn.Parameter]:
    """The region's parameters by their name in the unwrapped model, in forward order.

    Raises:
        SiteError: what the region names is not there, holds no parameters, or holds quantised ones.
    """
    chosen = region_of(backbone, region)
    sites = backbone.select(chosen.branches, chosen.sites or MLP, chosen.layers)
    found: dict[str, nn.Parameter] = {}
    taken: set[int] = set()  # a layer holds its parts, and weights may be tied
    for site in sites:
        for name, parameter in site.module.named_parameters(site.path):
            bias = name.endswith("bias") and not chosen.biases
            if not bias and id(parameter) not in taken:
                taken.add(id(parameter))
                found[name] = parameter
    if not found:
        raise SiteError(f"the sites {', '.join(s.path for s in sites)} hold no parameters to edit")
    packed = next((n for n, p in found.items() if not p.is_floating_point()), None)
    if packed is not None:
        raise SiteError(f"{packed} is quantised ({found[packed].dtype}) and cannot be edited")
    return found


def _listed(sites: Sequence[Site]) -> str:
    """Branch by branch: its roles, and how many layers it has."""
    lines = []
    for branch in dict.fromkeys(s.branch for s in sites):
        own = [s for s in sites if s.branch == branch]
        layers = len({s.layer for s in own if s.layer is not None})
        lines.append(f"{branch} ({layers} layers: {', '.join(dict.fromkeys(s.role for s in own))})")
    return "There are " + "; ".join(lines)
