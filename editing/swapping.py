"""Computing with other tensors in the place of a model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Found = TypeVar("Found")


class _Around(nn.Module):
    """A model whose forward pass is whatever is to be computed with its parts."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock

    def forward(self, compute: Callable[[], Any]) -> Any:
        return compute()


class Swapping:
    """Puts tensors in the place of a model's parameters while something is computed.

    Args:
        model: whose modules stay what they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._around = model, _Around(model)
        self._modules = list(model.named_modules())
        # Names of parameters -> (these, all names that each goes by), of the last call.
        self._known: tuple[tuple[str, ...], list[nn.Parameter], list[list[str]]] = ((), [], [])

    def computed(self, compute: Callable[[], Found], weights: Mapping[str, Tensor] | None) -> Found:
        """What is computed with `weights` (parameter name -> tensor); differentiable through them.

        A parameter that goes by several names (tied weights) is replaced under all of them.
        """
        if not weights:
            return compute()
        # torch would look for tied weights among all parameters by name, which takes longer than
        # the pass of a batch that is computed once.
        places = self._places(tuple(weights))
        named = {
            name: value
            for value, names in zip(weights.values(), places, strict=True)
            for name in names
        }
        return torch.func.functional_call(self._around, named, (compute,), tie_weights=False)

    def _places(self, wanted: tuple[str, ...]) -> list[list[str]]:
        parameters = [self._model.get_parameter(name) for name in wanted]
        known, those, places = self._known
        if known == wanted and all(a is b for a, b in zip(those, parameters, strict=True)):
            return places
        found: dict[int, list[str]] = {id(parameter): [] for parameter in parameters}
        for path, module in self._modules:
            for name, parameter in module._parameters.items():
                if id(parameter) in found:
                    own = f"stock.{path}.{name}".replace("..", ".")
                    found[id(parameter)].append(own)
        places = [found[id(parameter)] for parameter in parameters]
        self._known = wanted, parameters, places
        return places
