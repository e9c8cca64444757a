"""What can be tuned: stock models, their sites, and how to load them by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmtune.backbones.base import (
    Backbone,
    ImageSpec,
    Loaded,
    PairEmbeddings,
    Site,
    SiteError,
)

if TYPE_CHECKING:
    from torch import nn

_REGISTERED: list[type[Backbone]] = []


def families() -> dict[str, type[Backbone]]:
    """Every backbone family by name: those that ship, then those registered."""
    from mmtune.backbones.blip import Blip
    from mmtune.backbones.blip2 import Blip2
    from mmtune.backbones.clip import HFClip, Siglip
    from mmtune.backbones.llava import Llava
    from mmtune.backbones.llava_onevision import LlavaOnevision
    from mmtune.backbones.minigpt4 import MiniGPT4
    from mmtune.backbones.open_clip import OpenClip
    from mmtune.backbones.qwen_vl import QwenVL

    towers: tuple[type[Backbone], ...] = (OpenClip, HFClip, Siglip, Blip)
    writers = (MiniGPT4, Blip2, Llava, LlavaOnevision, QwenVL)
    return {cls.family: cls for cls in (*towers, *writers, *_REGISTERED)}


def register(cls: type[Backbone]) -> type[Backbone]:
    """Add a backbone family of your own; usable as a class decorator."""
    if cls.family in families():
        raise ValueError(f"a backbone family {cls.family!r} exists already; choose another name")
    _REGISTERED.append(cls)
    return cls


def backbone_of(model: nn.Module) -> Backbone:
    """The view of a stock model, wrapped or not.

    Raises:
        TypeError: no family describes this model; the message lists those there are.
    """
    inner = unwrapped(model)
    for cls in families().values():
        if cls.matches(inner):
            return cls(inner)
    known = "; ".join(f"{name}: {cls.summary}" for name, cls in families().items())
    raise TypeError(
        f"no backbone describes {type(inner).__module__}.{type(inner).__name__}. There are "
        f"{known}. For a model of your own, subclass mmtune.backbones.Backbone and register it."
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The stock model inside DistributedDataParallel, torch.compile and PeftModel."""
    inner: Any = model
    while True:
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif type(inner).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = inner.module
        else:
            return inner


def load(name: str, dtype: str = "float32") -> Loaded:
    """Load a model by name; see `mmtune.backbones.loading.load`."""
    from mmtune.backbones.loading import load as load_by_name

    return load_by_name(name, dtype)


__all__ = [
    "Backbone",
    "ImageSpec",
    "Loaded",
    "PairEmbeddings",
    "Site",
    "SiteError",
    "backbone_of",
    "families",
    "load",
    "register",
    "unwrapped",
]
