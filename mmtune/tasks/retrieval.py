"""Image-text retrieval: contrastive training of a two-tower model, and recall both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mmtune.tasks.pairs import PairOptions, PairTask

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmtune.backbones.base import PairEmbeddings

MAX_SCALE = 100.0  # CLIP's own limit on a trained temperature


@dataclass(frozen=True)
class RetrievalOptions(PairOptions):
    """Settings of the retrieval task.

    Attributes:
        loss: "clip" (softmax) or "sigmoid" (SigLIP's); "auto" takes sigmoid where the model has a
            logit bias.
        train_logit_scale: train the temperature (and bias) too. It is not part of an adapter file;
            rankings do not depend on it.
        sigmoid_bias: added to the logits of the sigmoid loss where the model has no bias.
        captions, identical, augment, eval_batch_size, resamples: see `PairOptions`.
    """

    loss: Literal["auto", "clip", "sigmoid"] = "auto"
    train_logit_scale: bool = False
    sigmoid_bias: float = -10.0


class RetrievalTask(PairTask):
    """Find the image for a text and the text for an image; arguments as `MediaTask`."""

    name: ClassVar[str] = "retrieval"
    summary: ClassVar[str] = "image-text retrieval: CLIP or sigmoid loss; R@1/5/10 both ways"
    options: ClassVar[type] = RetrievalOptions

    def before_training(self, model: nn.Module) -> None:
        """Make the temperature trainable where `train_logit_scale` asks for it.

        Call it after the adapter was put on the model (PEFT freezes everything else) and before the
        optimiser is made.
        """
        if self.settings.train_logit_scale:
            for name, parameter in model.named_parameters():
                if name.rsplit(".", 1)[-1] in ("logit_scale", "logit_bias"):
                    parameter.requires_grad_(True)

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """The contrastive loss of this process's pairs against those of all processes.

        Raises:
            ValueError: train_logit_scale is set, but the model's temperature is frozen.
        """
        from mmtune.tasks.losses import clip_loss, sigmoid_loss

        batch = self._in_dtype(batch)
        groups = batch.pop("groups") if self.settings.identical == "positive" else None
        pairs = self._embed_pairs(model, batch)
        scale, bias = pairs.scale, pairs.bias
        if not self.settings.train_logit_scale:
            scale, bias = scale.detach(), None if bias is None else bias.detach()
        elif model.training and not scale.requires_grad:
            raise ValueError(
                "task.train_logit_scale is true, but the model's logit_scale is frozen: call "
                "task.before_training(model) before the optimiser is made"
            )
        else:
            scale = scale.clamp(max=MAX_SCALE)
        kind = self.settings.loss
        if kind == "clip" or (kind == "auto" and bias is None):
            return clip_loss(pairs.image, pairs.text, scale, groups), {}
        if bias is None:
            bias = scale.new_full((), self.settings.sigmoid_bias)
        return sigmoid_loss(pairs.image, pairs.text, scale, bias, groups), {}

    def _embed_pairs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> PairEmbeddings:
        return self.loaded.backbone.embed_pairs(model, batch)
