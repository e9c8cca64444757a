"""P-tuning v2: deep prompts, one for each task, and classification heads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from mmtune.backbones import backbone_of
from mmtune.backbones.base import Backbone, Site
from mmtune.suggestions import did_you_mean
from mmtune.tuners.registry import Method, config_of, options_of
from mmtune.tuners.sited import SitedConfig
from mmtune.tuners.virtual_keys import VirtualKeys, VirtualKeysTuner

SHARED = "shared"


@dataclass
class PTuningV2Config(SitedConfig):
    """Deep prompts: learned keys and values before those of every attention, without a perceptron.

        Attention(q, [S_K; P_K; K], [S_V; P_V; V]),    S of the shared prompt, P of the task in use

    One adapter can hold the prompts of several tasks, each of its own length, and a prompt that all
    tasks share; `set_task` says whose is in use. `classes` gives tasks a Linear head on a dual
    encoder's image or text embedding, saved with the adapter; `classify` computes its logits.

    Trainable parameters of a branch of width d with L attentions: 2 L p d, p summed over the tasks'
    prompts and the shared one (reparameterised: that of `PrefixConfig` for each prompt); e n + n
    for a head of n classes on an embedding of e features.

    Args:
        tokens: p, where there is one task. Simple classification does with fewer than 20; sequence
            labelling wants about 100.
        tasks: task -> p. Empty means one task, "task", of `tokens`.
        shared: length of the prompt that all tasks see before their own; 0 means none.
        task: the task in use; None means the first.
        classes: task -> number of classes.
        feature: whose embedding the heads read.
        reparameterise: train a perceptron, as in prefix tuning, of bottleneck `bottleneck`.
        bottleneck: m.
        branches, layers, seed, adapted: see `SitedConfig`.

    Source:
        "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and
        Tasks", ACL 2022, arXiv 2110.07602, section 3.3. Differs in the start, N(0, 0.02^2) instead
        of N(0, 1), and in the head's input, a normalised embedding.
    """

    peft_name: ClassVar[str] = "P_TUNING_V2"

    tokens: int = 20
    tasks: dict[str, int] = field(default_factory=dict)
    shared: int = 0
    task: str | None = None
    classes: dict[str, int] = field(default_factory=dict)
    feature: Literal["image", "text"] = "image"
    reparameterise: bool = False
    bottleneck: int = 512

    def problems(self) -> Iterator[str]:
        for name, p in self.own().items():
            where = f"tasks.{name}" if self.tasks else "tokens"
            if p < 1:
                yield f"ptuning_v2.{where} must be at least 1, got {p}. Try 20."
            if name == SHARED or not re.fullmatch(r"[A-Za-z0-9-]+(_[A-Za-z0-9-]+)*", name):
                yield (
                    f"ptuning_v2.tasks: {name!r} names no task; expected letters, digits, '-' and "
                    f"single '_', and not {SHARED!r}"
                )
        if self.shared < 0:
            yield f"ptuning_v2.shared must be at least 0, got {self.shared}"
        if self.bottleneck < 1:
            yield f"ptuning_v2.bottleneck must be at least 1, got {self.bottleneck}. Try 512."
        if self.task is not None and self.task not in self.own():
            yield _no_task(self.task, self.own())
        for name, n in self.classes.items():
            if name not in self.own():
                yield f"ptuning_v2.classes: {_no_task(name, self.own())}"
            if n < 2:
                yield f"ptuning_v2.classes.{name} must be at least 2, got {n}"

    def own(self) -> dict[str, int]:
        """Task -> length of its own prompt."""
        return dict(self.tasks) or {"task": self.tokens}

    def lengths(self) -> dict[str, int]:
        """Every prompt: the shared one first."""
        return ({SHARED: self.shared} if self.shared else {}) | self.own()

    def in_use(self) -> list[str]:
        """The prompts that attention sees now."""
        task = self.task or next(iter(self.own()))
        return [SHARED, task] if self.shared else [task]

    def perceptron(self) -> int | None:
        """M, or None for flat prompts."""
        return self.bottleneck if self.reparameterise else None


class DeepPrompts(VirtualKeys):
    """The prompts of all tasks, and their heads: weight [n, e], bias [n]."""

    adapter_layer_names = ("mmtune_keys", "mmtune_heads")

    def __init__(self) -> None:
        super().__init__()
        self.mmtune_heads = nn.ModuleDict()

    def add_heads(
        self,
        name: str,
        classes: Mapping[str, int],
        features: int,
        generator: torch.Generator | None,
    ) -> None:
        """Make an adapter's heads, task -> classes, on an embedding of `features`."""
        heads = {}
        for task, n in classes.items():
            heads[f"{task}_weight"] = 0.02 * torch.randn(n, features, generator=generator)
            heads[f"{task}_bias"] = torch.zeros(n)
        self.mmtune_heads[name] = nn.ParameterDict(heads)

    def logits(self, name: str, task: str, embedding: Tensor) -> Tensor:
        """[b, e] -> [b, n], float32."""
        head = cast(nn.ParameterDict, self.mmtune_heads[name])
        return F.linear(embedding.float(), head[f"{task}_weight"], head[f"{task}_bias"])


class PTuningV2Model(VirtualKeysTuner):
    """P-tuning v2 as a PEFT tuner."""

    tuner_layer_cls = keys_class = DeepPrompts
    keys_name = "deep_prompts"

    def _choose(self, backbone: Backbone, config: Any) -> Sequence[Site]:
        self._features = _embedding_size(backbone) if config.classes else 0
        return super()._choose(backbone, config)

    def _adapt(self, config: Any, adapter_name: str, target: Any, site: Site) -> nn.Module:
        super()._adapt(config, adapter_name, target, site)
        prompts: DeepPrompts = self.model.get_submodule(self.keys_name)  # pyright: ignore[reportAssignmentType]
        prompts.parts[adapter_name] = config.in_use()
        if config.classes and adapter_name not in prompts.mmtune_heads:
            prompts.add_heads(adapter_name, config.classes, self._features, self._generator)
            self._settle(prompts, adapter_name, next(target.parameters()).device)
        return target


def set_task(model: PeftModel, task: str, adapter_name: str = "default") -> None:
    """Put the prompt of `task` in use; saving the adapter records it.

    Raises:
        ValueError: the adapter has no such task; the message lists those it has.
    """
    config = _config(model, adapter_name)
    if task not in config.own():
        raise ValueError(_no_task(task, config.own()))
    config.task = task
    _prompts(model, adapter_name).parts[adapter_name] = config.in_use()


def classify(
    model: PeftModel,
    batch: Mapping[str, Tensor],
    task: str | None = None,
    adapter_name: str = "default",
) -> Tensor:
    """Class logits of images or texts, through the prompt and the head of a task.

    Args:
        model: a dual encoder wrapped by P-tuning v2.
        batch: {pixel_values} or {input_ids, attention_mask?}, as the config's `feature` says.
        task: is put in use first; None means the one in use.
        adapter_name: the adapter with the head.

    Returns:
        [b, n], float32.

    Raises:
        ValueError: no such task, or it has no head.
    """
    config = _config(model, adapter_name)
    if task is not None:
        set_task(model, task, adapter_name)
    task = config.in_use()[-1]
    if task not in config.classes:
        raise ValueError(
            f"task {task!r} has no classification head; set ptuning_v2.classes: {{{task}: n}} "
            "before training"
        )
    backbone = backbone_of(model)
    if config.feature == "image":
        embedding = backbone.encode_image(model, batch["pixel_values"])
    else:
        mask = batch.get("attention_mask")
        embedding = backbone.encode_text(model, batch["input_ids"], mask)
    return _prompts(model, adapter_name).logits(adapter_name, task, embedding)


def _config(model: PeftModel, adapter_name: str) -> PTuningV2Config:
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, PTuningV2Config):
        found = f"a {type(config).__name__}" if config else "no such adapter"
        raise ValueError(f"expected {adapter_name!r} to be an adapter of ptuning_v2, got {found}")
    return config


def _prompts(model: PeftModel, adapter_name: str) -> DeepPrompts:
    return next(
        m for m in model.modules() if isinstance(m, DeepPrompts) and adapter_name in m.slots
    )


@torch.no_grad()
def _embedding_size(backbone: Backbone) -> int:
    """E, which images and texts share, from a text of zeros."""
    text = backbone.trunks().get("text")
    length = text.context if text and text.context else 1
    device = next(backbone.model.parameters()).device
    ids = torch.zeros(1, length, dtype=torch.long, device=device)
    return backbone.encode_text(backbone.model, ids).shape[-1]


def _no_task(task: str, known: Mapping[str, int]) -> str:
    return f"no task {task!r}; there are {', '.join(known)}.{did_you_mean(task, list(known))}"


PEFT_METHODS = {PTuningV2Config.peft_name: (PTuningV2Config, PTuningV2Model)}
METHODS = (
    Method(
        name="ptuning_v2",
        summary="deep prompts in every layer, several tasks in one adapter, heads",
        source="arXiv 2110.07602 (ACL 2022)",
        options=options_of(PTuningV2Config, leave_out=["adapted"]),
        build=config_of(PTuningV2Config),
    ),
)
