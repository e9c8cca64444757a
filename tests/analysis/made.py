"""Tiny models with adapters that are not zero, as the commands would find them."""

from __future__ import annotations

import torch

from mmtune import AuroraConfig, lora_config
from mmtune.backbones import backbone_of
from mmtune.backbones.base import ImageSpec, Loaded
from mmtune.conformance import backbones as cases
from mmtune.runs import RunFolder
from mmtune.tuners import registry

RUN = """\
name: small
model: {name: "test:NAME"}
task: {name: retrieval}
data: {test: {format: zoo, name: clipart-animals}}
tuner: {method: METHOD}
"""


def load(name, dtype="float32"):
    """`mmtune.backbones.load` for names like test:open_clip, or test:open_clip/SEED."""
    model_name, _, seed = name.removeprefix("test:").partition("/")
    model = cases.build(model_name, int(seed or 0))
    spec = ImageSpec(cases.IMAGE, (0.5,) * 3, (0.5,) * 3)
    return Loaded(model, backbone_of(model), spec, lambda texts: {}, cases.CONTEXT, name, len)


def wrap(config, name="open_clip", seed=0, zero=False):
    """A PeftModel whose update is not zero unless asked for, as training would leave it."""
    import peft

    loaded = load(f"test:{name}")
    loaded.backbone.prepare()
    model = peft.get_peft_model(loaded.model, config(loaded.model) if callable(config) else config)
    generator = torch.Generator().manual_seed(seed)
    if not zero:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def aurora(rank=3, **settings):
    return AuroraConfig(**{"rank": rank, "sites": ["q", "v", "fc1", "fc2"], "seed": 0, **settings})


def lora(rank=2, **settings):
    chosen = {"rank": rank, "sites": ["q", "v", "fc1", "fc2"], **settings}
    return lambda model: lora_config(model, **chosen)


def method(name, **settings):
    """Any method of the registry, with its own options."""
    found = registry.method(name)
    return lambda model: found.build(model, found.options(**settings))


def save(model, folder):
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def run(folder, model, name="open_clip", method="aurora"):
    """A run folder with this adapter."""
    folder.mkdir()
    RunFolder(folder).config.write_text(RUN.replace("NAME", name).replace("METHOD", method))
    save(model, RunFolder(folder).adapter)
    return folder
