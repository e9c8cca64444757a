"""Image-text retrieval as BLIP is fine-tuned for it: contrast, matching, two-stage evaluation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from mmtune.data.options import DataOptions
from mmtune.tasks.base import device_of, on_device
from mmtune.tasks.pairs import Embedded, Gallery, PairOptions, PairTask

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmtune.backbones.base import Backbone, Loaded
    from mmtune.backbones.blip_matching import Matching
    from mmtune.metrics.recall import RetrievalRanks
    from mmtune.tasks.momentum import Momentum
    from mmtune.tuners.aurora.context import PooledContext

log = logging.getLogger(__name__)
RERANKED = " (re-ranked)"
Head = Literal["vision_proj", "text_proj", "itm_head"]


@dataclass(frozen=True)
class BlipRetrievalOptions(PairOptions):
    """Settings of BLIP's retrieval task.

    Attributes:
        temperature: divides cosines. transformers keeps none; the original's is learned in
            pre-training and is 0.07 at first.
        queue: pairs of momentum features kept as further negatives; 0 keeps none.
        momentum: decay of the averages of what trains, of which the momentum encoder is made.
        alpha: share of the momentum encoder in the contrastive targets; it rises from zero over the
            first epoch.
        negatives: where hard negatives are drawn from: the batches of "all" processes, or of the
            "own" one, which exchanges no hidden states.
        train_heads: heads that train whole; the adapter's file holds them.
        match_token: id that begins a text read with its image. null takes what the model's config
            says: [ENC] in a converted checkpoint of the original code, the text's own elsewhere.
            (A hub repository of transformers names none; the original's id is 30523.)
        rerank: how many of the best answers by features are ranked again by match score, both ways;
            0 leaves that stage out. Published results have 256 on COCO, 128 on Flickr30k.
        captions: as in `PairOptions`, but "all" is the default.
        identical: as in `PairOptions`; captions of one image match in the loss in either case.
        augment, eval_batch_size, resamples: see `PairOptions`.

    Source:
        BLIP (arXiv 2201.12086) and the fine-tuning settings of its released code; train_heads as in
        Aurora's (arXiv 2305.08381).
    """

    captions: Literal["sampled", "all"] = "all"
    temperature: Annotated[float, Field(gt=0)] = 0.07
    queue: Annotated[int, Field(ge=0)] = 57600
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.995
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.4
    negatives: Literal["all", "own"] = "all"
    train_heads: list[Head] = field(default_factory=lambda: ["vision_proj", "itm_head"])
    match_token: Annotated[int, Field(ge=0)] | None = None
    rerank: Annotated[int, Field(ge=0)] = 128


class BlipRetrievalTask(PairTask):
    """Contrast (ITC) with momentum distillation, and matching (ITM) with hard negatives.

    A step is one forward pass of the wrapped model: the image and the text encoder with averaged
    and with present parameters, then 3 b texts read with images. Dropout acts alike in all of it.

    Args:
        options: see `BlipRetrievalOptions`.
        data, loaded, seed, progress: see `MediaTask`; the seed also decides the hard negatives.

    Raises:
        TypeError: the model is no BlipForImageTextRetrieval.
    """

    name: ClassVar[str] = "blip_retrieval"
    summary: ClassVar[str] = "image-text retrieval with BLIP: ITC and ITM; R@K, then re-ranked"
    options: ClassVar[type] = BlipRetrievalOptions

    def __init__(
        self,
        options: BlipRetrievalOptions,
        data: DataOptions,
        loaded: Loaded,
        seed: int,
        progress: bool = True,
    ) -> None:
        _matching(loaded.backbone, loaded.model)
        super().__init__(options, data, loaded, seed, progress)
        self._momentum: Momentum | None = None
        self._told = False

    @classmethod
    def heads(cls, options: BlipRetrievalOptions, backbone: Backbone) -> list[str]:
        return list(options.train_heads)

    def hooks(self, model: nn.Module, total_steps: int) -> Momentum:
        """The momentum encoder and the queue of a run that trains `model`."""
        from mmtune.tasks.momentum import FeatureQueue, Momentum, MomentumEncoder

        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        encoder = MomentumEncoder(trained, self.settings.momentum)
        self._momentum = Momentum(encoder, FeatureQueue(self.settings.queue), self.seed)
        return self._momentum

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """ITC + ITM of this process's pairs; in training mode the queue takes them in.

        A model that no run trains gets a momentum encoder of its own at the first call.
        """
        from mmtune.backbones import unwrapped
        from mmtune.backbones.base import forward_through
        from mmtune.tuners.aurora.context import context_of

        momentum = self._momentum or self.hooks(model, 0)
        inputs = self._in_dtype(batch)
        if self.settings.identical == "distinct":
            inputs["groups"] = inputs["groups"][:, :1]
        context = context_of(model) if model.training else None
        stock = unwrapped(model)
        parts = _matching(self.loaded.backbone, stock, self.settings.match_token)
        alpha = self._alpha(momentum)
        step = partial(self._step, parts, momentum, context, alpha, model.training)
        found = forward_through(model, stock, step, **inputs)
        if not found["negatives"] and not self._told:
            self._told = True
            log.warning(
                "a batch without hard negatives: its %d pairs all match one another. Such batches "
                "train matching on positives alone; raise training.batch_size.",
                len(inputs["groups"]),
            )
        numbers = {name: found[name].detach() for name in ("itc", "itm", "negatives")}
        return found["itc"] + found["itm"], numbers | {"alpha": alpha}

    def _alpha(self, momentum: Momentum) -> float:
        pairs = len(self.train_dataset)  # type: ignore[arg-type]
        return self.settings.alpha * min(1.0, momentum.seen / pairs)

    def _step(
        self,
        parts: Matching,
        momentum: Momentum,
        context: PooledContext | None,
        alpha: float,
        training: bool,
        *,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        groups: Tensor,
    ) -> dict[str, Tensor]:
        """Everything of a step that is computed inside the forward pass."""
        import torch

        from mmtune.tasks.losses import Gathered
        from mmtune.tasks.matching import Encoded, matching_loss, read_together, same_width
        from mmtune.tasks.momentum import Bank, distilled_clip_loss

        gather = Gathered(len(groups), groups.device)
        ids, mask = same_width(gather, input_ids, attention_mask)
        with momentum.encoder.applied():
            teacher = Bank(
                parts.image_features(parts.image_states(pixel_values)),
                parts.text_features(parts.text_states(ids, mask)),
                groups,
            )
        images, texts = parts.image_states(pixel_values), parts.text_states(ids, mask)
        features = Bank(parts.image_features(images), parts.text_features(texts), groups)
        taught = Bank(gather(teacher.image), gather(teacher.text), gather(groups))
        bank, temperature = momentum.queue.after(taught), self.settings.temperature
        itc = distilled_clip_loss(features, teacher, bank, temperature, alpha, gather)

        own = Encoded(ids, mask, images, features)
        others = own.gathered(gather) if self.settings.negatives == "all" else own
        uniform = momentum.uniform(gather.total, 2).to(groups.device)
        uniform = uniform[gather.first : gather.first + gather.size]
        fused, found = read_together(parts, own, others, uniform, temperature)
        if context is not None:
            count = len(groups) if context.positives_only else len(fused)
            enhanced = context.enhance(fused[:count], gather(texts[:, 0]))
            fused = torch.cat([enhanced, fused[count:]])
        itm = matching_loss(parts.logits(fused), found, gather)
        if training:
            momentum.remember(taught)
        return {"itc": itc, "itm": itm, "negatives": found.float().mean()}

    def _rank(
        self, model: nn.Module, gallery: Gallery, embedded: Embedded, bar: Any
    ) -> dict[str, RetrievalRanks]:
        """By features; then by features and match scores, where `rerank` asks for it."""
        ranks = super()._rank(model, gallery, embedded, bar)
        if self.settings.rerank:
            ranks[RERANKED] = self._rerank(model, gallery, embedded, bar)
        return ranks

    def _rerank(
        self, model: nn.Module, gallery: Gallery, embedded: Embedded, bar: Any
    ) -> RetrievalRanks:
        import numpy as np
        import torch

        from mmtune.metrics.recall import RetrievalRanks, rank_queries
        from mmtune.tasks.reranking import PairScores, Reranked, shortlist

        images, texts = embedded.images, embedded.texts
        texts_of = shortlist(images, texts, self.settings.rerank)
        images_of = shortlist(texts, images, self.settings.rerank)
        scores = PairScores.of_shortlists(texts_of, images_of)
        bar.total += len(scores.keys) + len(gallery.records) + len(gallery.captions)
        device = device_of(model)
        scores.fill(
            _matching(self.loaded.backbone, model, self.settings.match_token),
            self._pixels(model, gallery.records),
            on_device(self.loaded.tokenize(embedded.distinct), device),
            self.settings.eval_batch_size,
            bar,
        )
        number = torch.tensor(embedded.text_of, device=device)
        image, text = (torch.arange(len(x), device=device)[:, None] for x in (images, texts))
        txt2img = rank_queries(
            Reranked(texts[number], images, images_of[number], scores.of(images_of, text)[number]),
            gallery.images_of,
            progress=bar.update,
        )
        img2txt = rank_queries(
            Reranked(images, texts, texts_of, scores.of(image, texts_of), number),
            gallery.captions_of,
            progress=bar.update,
        )
        return RetrievalRanks(txt2img, img2txt, np.asarray(gallery.owner))


def _matching(backbone: Any, model: nn.Module, first: int | None = None) -> Matching:
    """The parts of a BLIP model. TypeError where the model is another."""
    if not hasattr(backbone, "matching"):
        raise TypeError(
            "task.name: blip_retrieval needs BLIP's match head, a BlipForImageTextRetrieval; got "
            f"{type(backbone.model).__name__}. For other models use task.name: retrieval."
        )
    return backbone.matching(model, first)
