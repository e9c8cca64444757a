"""AdapterFusion: attention over the outputs of adapters that were trained apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtune.backbones.base import Backbone, Site
from mmtune.tuners.adapters import CONFIG_FILE, WEIGHTS_FILE, adapter_method
from mmtune.tuners.bottleneck import (
    AdaptedLinear,
    AdapterConfig,
    AdapterModel,
    squeeze,
)
from mmtune.tuners.hooks import TrainingHooks
from mmtune.tuners.registry import Method, config_of, options_of
from mmtune.tuners.sited import AdapterMismatchError

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS = ("down", "down_bias", "up", "up_bias")
UNTRAINED = "random:"
# What the fused adapters have in common, and this config takes over from them.
SHARED = ("branches", "layers", "placement", "bottleneck", "activation", "scale", "parallel")


@dataclass
class AdapterFusionConfig(AdapterConfig):
    """The second stage: adapters trained apart are frozen, and an attention over them is trained.

    In every sublayer that the adapters sit in, with y its output and a_n what adapter n adds to it:

        y + V sum_n softmax_n((Q y + b_q) . (K a_n + b_k)) a_n

    Q and K start from N(0, 0.02^2), V as identity: a fresh fusion is a weighted mean of the
    adapters, and one adapter alone is that adapter. Training adds `penalty` * ||I - V||^2 for every
    sublayer.

    Trainable parameters: 3 d^2 + 2 d for each sublayer. The adapters' weights are kept in this
    adapter's own file, which needs no other to be loaded.

    Args:
        adapters: name -> folder of an adapter of method `adapter`; all of one shape, at the same
            sites. "random:SEED" is a random, untrained one with the default settings, to try
            things out. A saved config keeps the names alone.
        penalty: factor on ||I - V||^2.
        seed, adapted: see `SitedConfig`. The other settings are the adapters' own.

    Source:
        arXiv 2005.00247, section 3.2. As in its released code, the residual path around the
        adapters does not pass through V, and the adapters' outputs are taken without it (in Q K
        that makes no difference); its decaying temperature is left out.
    """

    peft_name: ClassVar[str] = "ADAPTER_FUSION"

    adapters: dict[str, str] = field(default_factory=dict)
    penalty: float = 0.01

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not self.adapters:
            yield (
                "adapter_fusion.adapters must name trained adapters, got none. Train some with "
                "method adapter, then set adapters: {NAME: runs/NAME/adapter, ...}."
            )
        if self.penalty < 0:
            yield f"adapter_fusion.penalty must be 0 or more, got {self.penalty}. Try 0.01."

    def to_dict(self) -> dict[str, Any]:
        """What is saved: the names of the adapters without this machine's folders."""
        return super().to_dict() | {"adapters": dict.fromkeys(self.adapters, "")}


class Fusion(nn.Module):
    """V sum_n softmax_n((Q y + b_q) . (K a_n + b_k)) a_n, with the adapters' weights as buffers.

    Parameters: query, key, value [d, d], query_bias, key_bias [d], float32.
    Buffers: down [n, m, d'], down_bias [n, m], up [n, d, m], up_bias [n, d] of n adapters.
    """

    def __init__(
        self,
        bank: Sequence[Tensor],
        activation: str,
        scale: float,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.activation, self.scale = activation, scale
        for name, stacked in zip(WEIGHTS, bank, strict=True):
            self.register_buffer(name, stacked)
        d = bank[-1].shape[1]
        for name in ("query", "key"):
            start = 0.02 * torch.randn(d, d, generator=generator)
            self.register_parameter(name, nn.Parameter(start))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(d)))
        self.value = nn.Parameter(torch.eye(d))

    def forward(self, source: Tensor, y: Tensor) -> Tensor:
        """What the fused adapters add to y.

        Args:
            source: [..., d'], what the adapters are fed with.
            y: [..., d], the sublayer's output.
        """
        bank = [getattr(self, name) for name in WEIGHTS]
        count = bank[0].shape[0]
        outputs = [
            squeeze(source, [w[n] for w in bank], self.activation, self.scale) for n in range(count)
        ]
        a = torch.stack(outputs, dim=-2)  # [..., n, d]
        q = self._project("query", y)
        k = self._project("key", a)
        weights = torch.einsum("...d,...nd->...n", q, k).softmax(dim=-1)
        return F.linear((weights.unsqueeze(-1) * a).sum(-2), self.value.to(a.dtype))

    def _project(self, name: str, x: Tensor) -> Tensor:
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias")
        return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


class FusedLinear(AdaptedLinear):
    """The last Linear of a sublayer with the fusion of several adapters' outputs."""

    def added(self, name: str, source: Tensor, y: Tensor) -> Tensor:
        return self.mmtune_adapter[name](source, y)


@dataclass(frozen=True)
class Trained:
    """An adapter on disk, or (without tensors) an untrained one.

    Attributes:
        origin: what the fusion's config names it by, for messages.
        config: its settings.
        tensors: of its file.
        generator: of an untrained one's weights.
    """

    origin: str
    config: AdapterConfig
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    generator: torch.Generator | None = None

    def at(self, site: Site, d_in: int, d_out: int) -> list[Tensor]:
        """Its weights in the sublayer that ends at `site`, as `squeeze` takes them."""
        m = self.config.bottleneck
        shapes = ((m, d_in), (m,), (d_out, m), (d_out,))
        if self.generator is not None:
            return [torch.randn(s, generator=self.generator) / s[-1] ** 0.5 for s in shapes]
        keys = [f"base_model.model.{site.path}.mmtune_adapter.{name}" for name in WEIGHTS]
        found = [self.tensors[key] for key in keys]
        for key, weight, shape in zip(keys, found, shapes, strict=True):
            if weight.shape != shape:
                raise AdapterMismatchError(
                    f"{key} of {self.origin} is {list(weight.shape)}, and this model needs "
                    f"{list(shape)}. Train the adapter on this backbone."
                )
        return found


def read_trained(origin: str) -> Trained:
    """The adapter in a folder, or "random:SEED".

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: an adapter of another method, or one that trained the norms too.
    """
    if origin.startswith(UNTRAINED):
        seed = origin.removeprefix(UNTRAINED)
        if not seed.isdigit():
            raise ValueError(
                f"adapter_fusion.adapters: expected {UNTRAINED}SEED with a number, got {origin!r}. "
                f"Try {UNTRAINED}0."
            )
        generator = torch.Generator().manual_seed(int(seed))
        return Trained(origin, AdapterConfig(), generator=generator)
    from safetensors.torch import load_file

    folder = Path(origin)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"adapter_fusion.adapters: {folder} holds no adapter: {file} is missing. A run's "
                "is in runs/NAME/adapter."
            )
    kind = adapter_method(folder)
    if kind != AdapterConfig.peft_name:
        raise ValueError(
            f"adapter_fusion fuses adapters of method adapter; {folder} holds {kind}. Train one "
            "with tuner.method: adapter."
        )
    config = cast(AdapterConfig, AdapterConfig.from_pretrained(str(folder)))
    if config.train_norms:
        raise ValueError(
            f"{folder} trained the norms too, of which a model has one set and not one for each "
            "adapter. Train it with train_norms: false to fuse it."
        )
    return Trained(origin, config, load_file(folder / WEIGHTS_FILE))


class AdapterFusionModel(AdapterModel):
    """Injects a fusion with its bank of frozen adapters wherever these sit."""

    layer_class = FusedLinear

    def _choose(self, backbone: Backbone, config: Any) -> Sequence[Site]:
        # Empty where a saved fusion is loaded, whose file fills the bank.
        self._trained = [read_trained(folder) for folder in config.adapters.values() if folder]
        if 0 < len(self._trained) < len(config.adapters):
            nowhere = [name for name, folder in config.adapters.items() if not folder]
            raise ValueError(f"adapter_fusion.adapters names no folder for {', '.join(nowhere)}")
        for name in SHARED if self._trained else ():
            setattr(config, name, self._common(name))
        chosen = super()._choose(backbone, config)
        for adapter in self._trained:
            theirs = adapter.config.adapted
            if theirs is not None and theirs != [site.path for site in chosen]:
                raise AdapterMismatchError(
                    f"{adapter.origin} sits on {len(theirs)} modules of the model it was trained "
                    f"on ({theirs[0]}, ...), and this {backbone.family} model offers "
                    f"{len(chosen)} at the same sites ({chosen[0].path}, ...). Train it on this "
                    "backbone."
                )
        return chosen

    def _common(self, setting: str) -> Any:
        """What a setting is in all of the adapters."""
        first, *others = self._trained
        value = getattr(first.config, setting)
        for other in others:
            if (differing := getattr(other.config, setting)) != value:
                raise AdapterMismatchError(
                    f"adapters of one shape at the same sites can be fused: {first.origin} has "
                    f"{setting} {value}, {other.origin} {differing}. Train both with the same."
                )
        return value

    def _fresh(self, config: Any, site: Site) -> nn.Module:
        d_in, d_out = self._widths(site)
        device = cast(Any, site.module).weight.device
        if self._trained:
            weights = [adapter.at(site, d_in, d_out) for adapter in self._trained]
            bank = [torch.stack(same).float().to(device) for same in zip(*weights, strict=True)]
        else:
            n, m = len(config.adapters), config.bottleneck
            shapes = ((n, m, d_in), (n, m), (n, d_out, m), (n, d_out))
            bank = [torch.zeros(shape, device=device) for shape in shapes]
        return Fusion(bank, config.activation, config.scale, self._generator)


class PullToIdentity(TrainingHooks):
    """Pulls every V towards the identity: penalty * sum ||I - V||^2."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        self.model, self.factor = model, factor

    def penalty(self) -> Tensor | None:
        values = [
            cast(Fusion, layer.mmtune_adapter[name]).value
            for layer in self.model.modules()
            if isinstance(layer, FusedLinear)
            for name in layer.acting("mmtune_adapter")
        ]
        far = [(v - torch.eye(len(v), device=v.device)).square().sum() for v in values]
        return self.factor * torch.stack(far).sum() if far else None


def _hooks(model: PeftModel, total_steps: int, seed: int) -> TrainingHooks:
    config: Any = model.active_peft_config
    return PullToIdentity(model, config.penalty)


PEFT_METHODS = {AdapterFusionConfig.peft_name: (AdapterFusionConfig, AdapterFusionModel)}
METHODS = (
    Method(
        name="adapter_fusion",
        summary="attention over adapters that were trained apart",
        source="arXiv 2005.00247 (EACL 2021)",
        options=options_of(
            AdapterFusionConfig, leave_out=[*SHARED, "init", "train_norms", "adapted"]
        ),
        build=config_of(AdapterFusionConfig),
        hooks=_hooks,
    ),
)
