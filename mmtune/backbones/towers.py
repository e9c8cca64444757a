"""Sites of the transformer layers that the families share, told by the names of their modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

from mmtune.backbones.base import Site

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LayerNames:
    """Where one kind of transformer layer keeps its parts: role -> path inside the layer.

    `norms` may name modules that some layers lack (an Identity is no site). `whole` is False where
    the names are a part of layers (cross-attention) whose rest is another branch.
    """

    roles: Mapping[str, str]
    norms: Sequence[str]
    whole: bool = True


HF_LAYER = LayerNames(
    roles={
        "attention": "self_attn",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "out": "self_attn.out_proj",
        "mlp": "mlp",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    },
    norms=("layer_norm1", "layer_norm2"),
)


def layer_sites(
    model: nn.Module, branch: str, layers_path: str, names: LayerNames, width: int
) -> Iterator[Site]:
    """Sites of every layer below `layers_path`: the layer itself, its parts, its norms."""
    for index, _ in enumerate(model.get_submodule(layers_path).children()):
        yield from sites_of_layer(model, branch, index, f"{layers_path}.{index}", names, width)


def sites_of_layer(
    model: nn.Module, branch: str, index: int, path: str, names: LayerNames, width: int
) -> Iterator[Site]:
    """Sites of the one layer at `path`, which is layer `index` of its branch."""
    from torch import nn

    layer = model.get_submodule(path)
    if names.whole:
        yield Site(branch, index, "layer", path, layer, width)
    for role, part in names.roles.items():
        yield Site(branch, index, role, f"{path}.{part}", attrgetter(part)(layer), width)
    for part in names.norms:
        module = attrgetter(part)(layer)
        if not isinstance(module, nn.Identity):
            yield Site(branch, index, "norm", f"{path}.{part}", module, width)


def single_sites(
    model: nn.Module, branch: str, role: str, paths: Sequence[str], width: int
) -> Iterator[Site]:
    """Sites outside the layers; paths that this model lacks, or that are Identity, are left out."""
    from torch import nn

    for path in paths:
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        if not isinstance(module, nn.Identity):
            yield Site(branch, None, role, path, module, width)
