"""What every tuner of this toolkit shares: it is injected at sites, and checks that it fits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.integrations import init_empty_weights
from peft.utils.other import AuxiliaryTrainingWrapper, _set_adapter
from torch import Tensor, nn

from mmtune.backbones import backbone_of
from mmtune.backbones.base import Backbone, Site, SiteError
from mmtune.backbones.fusions import Fusion
from mmtune.backbones.quick_gelu import slow
from mmtune.backbones.trunks import Trunk


class AdapterMismatchError(ValueError):
    """An adapter that was made for another backbone, or for other sites of it."""


@dataclass
class SitedConfig(PeftConfig):
    """What the config of every method has.

    Args:
        branches: branches to adapt; None means all that the backbone has for this method.
        layers: "all", "first:N", "last:N", or indices within each branch.
        seed: seed of the random start; None draws from torch's default generator.
        adapted: filled in when the adapter is made: the module paths it sits on. On loading, it
            must match the model.
    """

    peft_name: ClassVar[str]

    branches: list[str] | None = None
    layers: Any = "all"
    seed: int | None = None
    adapted: list[str] | None = None
    # PEFT reads these of every config; sites decide instead.
    target_modules: None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.peft_name  # pyright: ignore[reportAttributeAccessIssue]
        problems = list(self.problems())
        if problems:
            raise ValueError("\n".join(problems))

    def problems(self) -> Iterator[str]:
        """One sentence for each setting that makes no sense."""
        yield from ()


class Attached(nn.Module, BaseTunerLayer):
    """A tuner layer without a base layer, registered once in the adapted model.

    It holds what several modules share, or what belongs to no module. PEFT saves, switches, freezes
    and deletes it like any other layer; modules that use it hold unregistered references.

    Attributes:
        device: where its adapters belong; None while it has none.
    """

    device: torch.device | None = None

    def __init__(self) -> None:
        super().__init__()
        self._disable_adapters = False
        self.merged_adapters = []

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing to fold here."""

    def unmerge(self) -> None:
        """Nothing to undo here."""

    def _get_base_layer_device_and_dtype(
        self, base_layer: Any
    ) -> tuple[torch.device | None, torch.dtype | None]:
        """Whereto PEFT brings an adapter that it loaded into parameters without memory."""
        return self.device, None

    def detach(self) -> None:
        """Undo what was done to the stock model (hooks, extensions); it is unloaded next."""


class SitedTuner(BaseTuner):
    """A PEFT tuner whose targets are sites of a backbone rather than module-name patterns.

    Its config is a `SitedConfig`; one that has `sites` chooses by them.
    """

    # Common to all methods of this toolkit but Aurora, so that one can contain another.
    prefix = "mmtune_"
    tuner_layer_cls = BaseTunerLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's own declaration)
    # Why the method cannot be folded into the weights, as the end of "... cannot be merged: ".
    unmergeable: ClassVar[str | None] = None
    _parts: list[Any] | None = None  # what `set_adapter` visits, once it is known

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> PeftConfig:
        backbone = backbone_of(self.model)
        backbone.prepare()
        chosen = self._choose(backbone, peft_config)
        paths = [target.path for target in chosen]
        if peft_config.adapted is not None and list(peft_config.adapted) != paths:
            raise AdapterMismatchError(_mismatch(list(peft_config.adapted), paths))
        peft_config.adapted = paths
        self._sites: dict[str, Any] = {target.path: target for target in chosen}
        seed = peft_config.seed
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)
        return peft_config

    def _choose(self, backbone: Backbone, config: Any) -> Sequence[Site | Trunk | Fusion]:
        """The places to adapt, in forward order; raises for those that the method cannot adapt."""
        return backbone.select(config.branches, config.sites, config.layers)

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return key in self._sites

    def _create_and_replace(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        layer = self._adapt(peft_config, adapter_name, target, self._sites[current_key])
        if layer is not target:
            setattr(parent, target_name, layer)
            self._parts = None

    def _adapt(self, config: Any, adapter_name: str, target: Any, site: Any) -> nn.Module:
        """Put an adapter on one chosen place.

        Args:
            config: of the adapter.
            adapter_name: its name.
            target: what stands at the place: a stock module, or what an earlier adapter put there.
            site: the place, a `Site`, `Trunk` or `Fusion`.

        Returns:
            What stands there from now on: `target` itself, or what wraps it.
        """
        raise NotImplementedError

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Put an adapter on its sites, as PEFT does.

        PEFT asks of every module whether it is one of them, and then goes over all modules to see
        what trains. One more adapter that is not active changes nothing but its sites.
        """
        config: Any = self.peft_config[adapter_name]
        joins = (
            self.targeted_module_names
            and state_dict is None
            and not config.modules_to_save
            and adapter_name not in self.active_adapters
            and not any(part.merged for part in self._layers())  # PEFT unmerges them
        )
        if joins:
            self._join_adapters(model, adapter_name, low_cpu_mem_usage)
            return
        self._parts = None
        super().inject_adapter(
            model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
        )
        self._parts = None

    def _join_adapters(self, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool) -> None:
        """Put one more adapter on its sites; it is not active."""
        config: Any = self.peft_config[adapter_name]
        self._check_new_adapter_config(config)
        config = self._prepare_adapter_config(config, {})
        self._prepare_model(config, model)
        earlier = {id(layer) for layer in self._layers()}
        modules = dict(model.named_modules())
        paths = [path for path in modules if path in self._sites]  # in PEFT's order, as are draws
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            for path in paths:
                above, _, name = path.rpartition(".")
                self._create_and_replace(
                    config, adapter_name, modules[path], name, modules[above], current_key=path
                )
        for layer in self._layers():
            if id(layer) not in earlier:
                layer.set_adapter(self.active_adapters)
        known = set(self.targeted_module_names)
        self.targeted_module_names += [path for path in paths if path not in known]

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, as PEFT does, but walk over all modules only once."""
        for part in self._visited():
            if isinstance(part, AuxiliaryTrainingWrapper):
                _set_adapter(part, adapter_name, inference_mode=inference_mode)
                continue
            if part.merged:
                warnings.warn("merged adapters are unmerged before others act", stacklevel=2)
                part.unmerge()
            part.set_adapter(adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def _visited(self) -> list[Any]:
        """The tuner layers, and the wrappers of modules that train whole."""
        if self._parts is None:
            kinds = (self.tuner_layer_cls, AuxiliaryTrainingWrapper)
            self._parts = [m for m in self.model.modules() if isinstance(m, kinds)]
        return self._parts

    def _layers(self) -> Iterator[Any]:
        """The tuner layers."""
        return (p for p in self._visited() if not isinstance(p, AuxiliaryTrainingWrapper))

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Let an adapter be float32, as PEFT does, but look first whether it is."""
        own = (p for layer in self._layers() for p in _parameters(layer, adapter_name))
        if autocast_adapter_dtype and any(p.dtype != torch.float32 for p in own):
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Put the adapter's name into keys, as PEFT does, which takes it out of all keys it knows.

        The two places where it can be are tried; where it is at neither, PEFT has to say.
        """
        found = [_key_in(model, key, adapter_name) for key in state_dict]
        if None in found:
            return super()._remap_adapter_state_dict_for_load(
                model, config, adapter_name, state_dict
            )
        return dict(zip(cast(list[str], found), state_dict.values(), strict=True))

    def _attach(self, name: str, make: Callable[[], Attached]) -> Any:
        """The attached layer called `name`, made when it is first needed."""
        if not hasattr(self.model, name):
            self.model.add_module(name, make())
            self._parts = None
        return self.model.get_submodule(name)

    def _settle(self, layer: Any, adapter_name: str, device: torch.device) -> None:
        """Bring a layer's new adapter to its device, and let it train only if it is active."""
        if isinstance(layer, Attached):
            layer.device = device
        own = list(_parameters(layer, adapter_name))
        for parameter in own:
            if parameter.device != device and "meta" not in (parameter.device.type, device.type):
                parameter.data = parameter.data.to(device)
        if adapter_name in self.active_adapters:
            layer.set_adapter(self.active_adapters)
            return
        for parameter in own:
            parameter.requires_grad_(False)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if self.unmergeable:
            name = next(iter(self.peft_config.values())).peft_type
            raise ValueError(f"{name} cannot be merged: {self.unmergeable}")

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        self._parts = None
        slow(self.model)
        for name, child in list(self.model.named_children()):
            if isinstance(child, Attached):
                child.detach()
                delattr(self.model, name)
        return model


def _parameters(layer: Any, adapter_name: str) -> Iterator[nn.Parameter]:
    """An adapter's parameters in a tuner layer."""
    for group in layer.adapter_layer_names:
        held = getattr(layer, group)
        if adapter_name in held:
            own = held[adapter_name]
            yield from (own,) if isinstance(own, nn.Parameter) else own.parameters()


def _key_in(model: nn.Module, key: str, adapter_name: str) -> str | None:
    """The key in the model of a tensor with this key in a file; None where there is none such.

    `...group` is `...group.<adapter>`, and `...group.name` is `...group.<adapter>.name`.
    """
    path, _, last = key.rpartition(".")
    module: Any = model
    for name in path.split("."):
        module = module._modules.get(name)
        if module is None:
            return None
    if isinstance(module, nn.ModuleDict):
        has = adapter_name in module and hasattr(module[adapter_name], last)
        return f"{path}.{adapter_name}.{last}" if has else None
    group = module._modules.get(last)
    has = isinstance(group, nn.ParameterDict) and adapter_name in group
    return f"{key}.{adapter_name}" if has else None


def require_linear(sites: Sequence[Site], method: str) -> None:
    """Raise SiteError where a site holds no Linear, before anything is replaced."""
    for site in sites:
        if not hasattr(site.module, "in_features"):
            raise SiteError(
                f"{method} adapts Linear layers; {site.path} ({site.role}) is a "
                f"{type(site.module).__name__}. Choose sites among q, k, v, out, fc1, fc2."
            )


def _mismatch(recorded: list[str], found: list[str]) -> str:
    missing = [p for p in recorded if p not in found]
    extra = [p for p in found if p not in recorded]
    return (
        f"this adapter sits on {len(recorded)} modules of the model it was trained on; this model "
        f"offers {len(found)} at the same sites. Only in the adapter: {_some(missing)}. Only in "
        f"this model: {_some(extra)}. Load the adapter onto the backbone it was trained on."
    )


def _some(names: list[str], limit: int = 3) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
