"""Video-text retrieval: frames through the image tower, their features pooled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from mmtune.data.frames import FrameOptions
from mmtune.data.options import Count
from mmtune.tasks.blip_retrieval import BlipRetrievalOptions, BlipRetrievalTask
from mmtune.tasks.media import VideoTask
from mmtune.tasks.pairs import PairTask
from mmtune.tasks.retrieval import RetrievalOptions, RetrievalTask

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmtune.backbones.base import PairEmbeddings
    from mmtune.tasks.base import Evaluation, Metric


class VideoPairTask(VideoTask, PairTask):
    """A retrieval task on videos; options are `FrameOptions` and `PairOptions`."""

    def evaluate(self, model: nn.Module, split: str = "test", progress: bool = True) -> Evaluation:
        """As for images; the metrics' names say "vid"."""
        found = super().evaluate(model, split, progress)
        return replace(found, metrics=_of_videos(found.metrics))

    def compare(self, before: Evaluation, after: Evaluation) -> dict[str, Metric]:
        return _of_videos(super().compare(before, after))


def _of_videos(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    return {name.replace("img", "vid"): metric for name, metric in metrics.items()}


@dataclass(frozen=True)
class VideoRetrievalOptions(FrameOptions, RetrievalOptions):
    """Settings of the video retrieval task.

    Attributes:
        frames, eval_frames, sampling: see `FrameOptions`.
        augment: as for images; all frames of a video get the same crop, flip and colours.
        eval_batch_size: videos (of `eval_frames` frames each) or texts embedded at once.
        loss, train_logit_scale, sigmoid_bias, captions, identical, resamples: see
            `RetrievalOptions`.
    """

    eval_batch_size: Count = 16


class VideoRetrievalTask(VideoPairTask, RetrievalTask):
    """Find the video for a text and the text for a video.

    A video's embedding is the mean of its frames' normalised image embeddings, normalised again.
    The loss and the metrics are those of image retrieval, the median rank (MdR) among them. On
    BLIP these are its contrastive features, without its match head; `blip_video_retrieval` has
    both.

    Source:
        CLIP4Clip (arXiv 2104.08860), mean pooling without parameters.
    """

    name: ClassVar[str] = "video_retrieval"
    summary: ClassVar[str] = "video-text retrieval: pooled frames; R@1/5/10 and MdR both ways"
    options: ClassVar[type] = VideoRetrievalOptions

    def _embed_pairs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> PairEmbeddings:
        """One forward pass of b * f images and b texts, which the towers embed independently."""
        pixels = batch["pixel_values"]
        pairs = super()._embed_pairs(model, {**batch, "pixel_values": pixels.flatten(0, 1)})
        return replace(pairs, image=pooled(pairs.image, pixels.shape[1]))

    def _image_features(self, model: nn.Module, pixels: Tensor) -> Tensor:
        features = super()._image_features(model, pixels.flatten(0, 1))
        return pooled(features, pixels.shape[1])


def pooled(features: Tensor, frames: int) -> Tensor:
    """The mean over frames, normalised: [b * f, e] -> [b, e], in float32."""
    from torch.nn.functional import normalize

    return normalize(features.float().unflatten(0, (-1, frames)).mean(1), dim=-1)


@dataclass(frozen=True)
class BlipVideoRetrievalOptions(FrameOptions, BlipRetrievalOptions):
    """Settings of video retrieval with BLIP's two losses.

    Attributes:
        frames, eval_frames, sampling: see `FrameOptions`.
        augment: as for images; all frames of a video get the same crop, flip and colours.
        eval_batch_size: videos, texts, or texts read with a video at once.
        temperature, queue, momentum, alpha, negatives, train_heads, match_token, rerank, captions,
            identical, resamples: see `BlipRetrievalOptions`.
    """

    eval_batch_size: Count = 16


class BlipVideoRetrievalTask(VideoPairTask, BlipRetrievalTask):
    """Contrast on pooled features, matching on the tokens of all frames side by side.

    Source:
        BLIP (arXiv 2201.12086), section 5.4, which reads a text with the tokens of all frames.
    """

    name: ClassVar[str] = "blip_video_retrieval"
    summary: ClassVar[str] = "video-text retrieval with BLIP: ITC and ITM over frames; re-ranked"
    options: ClassVar[type] = BlipVideoRetrievalOptions
