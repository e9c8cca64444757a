"""Losses of texts, and what tasks on models that write share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn import functional as F

from mmtune.backbones.generative import Generative
from mmtune.tasks.losses import Gathered, several
from mmtune.tasks.media import MediaTask

if TYPE_CHECKING:
    from torch import Tensor

    from mmtune.backbones.base import Loaded
    from mmtune.data.options import DataOptions


def writer_of(loaded: Loaded, task: str) -> Generative:
    """The backbone of a model that writes text.

    Raises:
        ValueError: it does not, or came without a tokenizer.
    """
    backbone = loaded.backbone
    if not isinstance(backbone, Generative) or not backbone.writes:
        raise ValueError(
            f"task {task} needs a model that writes text, and {loaded.name} is a "
            f"{type(loaded.model).__name__}. Use BlipForQuestionAnswering (zoo:tiny-blip@vqa), "
            "BlipForConditionalGeneration (zoo:tiny-blip@caption), BLIP-2, MiniGPT-4, LLaVA or "
            "Qwen-VL."
        )
    if loaded.tokenizer is None:
        raise ValueError(f"{loaded.name} was loaded without its tokenizer; set Loaded.tokenizer")
    return backbone


class WritingTask(MediaTask):
    """A task on models that write text; arguments as `MediaTask`.

    The options have `prompt`: a template in place of the model family's own. Images become squares,
    augmented or not, also of families that could read them in their own shape.

    Raises:
        ValueError: the model does not write text.
    """

    template: ClassVar[str]  # which of the family's templates: "question" or "caption"

    def __init__(
        self,
        options: Any,
        data: DataOptions,
        loaded: Loaded,
        seed: int,
        progress: bool = True,
    ) -> None:
        self.writer = writer_of(loaded, self.name)
        own = self.writer.templates[self.template]
        self.prompt: str = own if options.prompt is None else options.prompt
        super().__init__(options, data, loaded, seed, progress)


def text_losses(logits: Tensor, ids: Tensor, mask: Tensor, smoothing: float = 0.0) -> Tensor:
    """[n] negative log-likelihood of each target text, summed over its tokens.

    Args:
        logits: [n, t, v] scores of the target tokens.
        ids: [n, t].
        mask: [n, t], 0 for padding.
        smoothing: share of the target's probability that is spread over all v tokens.
    """
    with torch.autocast(logits.device.type, enabled=False):
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(
            exact.flatten(0, 1), ids.flatten(), reduction="none", label_smoothing=smoothing
        )
        return (losses.view(ids.shape) * mask).sum(1)


def joint_mean(total: Tensor, count: int | Tensor) -> Tensor:
    """A process's part of (sum of all totals) / (sum of all counts), times the processes.

    DistributedDataParallel averages gradients over processes: with this loss they are those of the
    mean over the joint batch, also where processes hold different counts.
    """
    if not several():
        return total / count
    every = Gathered(int(count), total.device)
    return every.world * total / every.total


def server_id(identity: str) -> int | str:
    """An id as evaluation servers take it: a number where it is one."""
    return int(identity) if identity.isdecimal() else identity
