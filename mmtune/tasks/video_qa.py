"""Questions about videos, answered by BLIP: the tokens of all frames stand side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mmtune.data.frames import FrameOptions
from mmtune.data.options import Count, DataOptions
from mmtune.tasks.media import VideoTask
from mmtune.tasks.vqa import VqaOptions, VqaTask

if TYPE_CHECKING:
    from mmtune.backbones.base import Loaded


@dataclass(frozen=True)
class VideoQaOptions(FrameOptions, VqaOptions):
    """Settings of the video question answering task.

    Attributes:
        frames, eval_frames, sampling: see `FrameOptions`. Published results of BLIP look at 16.
        augment: as for images; all frames of a video get the same crop, flip and colours.
        eval_batch_size: questions at once, each with `eval_frames` frames.
        inference, prompt, answer_list, candidates, missing_answers, beams, max_tokens,
            label_smoothing, dataset_weights, groups, resamples: see `VqaOptions`.
    """

    eval_batch_size: Count = 8


class VideoQaTask(VideoTask, VqaTask):
    """Answer questions about videos; the loss and the ways to answer are those of VQA.

    Frames pass through the image tower one by one, and the question attends to the tokens of all of
    them. What tells them apart is what they show: nothing marks their order. The score is the share
    of exact matches (after the VQA metric's processing of punctuation and articles).

    Args:
        options: see `VideoQaOptions`.
        data, loaded, seed, progress: see `MediaTask`; every video is opened once here.

    Raises:
        ValueError: a model that does not read several frames and write text.

    Source:
        BLIP (arXiv 2201.12086), section 5.4.
    """

    name: ClassVar[str] = "video_qa"
    summary: ClassVar[str] = "video question answering with BLIP: frames' tokens side by side"
    options: ClassVar[type] = VideoQaOptions
    measures: ClassVar[tuple[str, ...]] = ("exact match",)

    def __init__(
        self,
        options: VideoQaOptions,
        data: DataOptions,
        loaded: Loaded,
        seed: int,
        progress: bool = True,
    ) -> None:
        if not getattr(loaded.backbone, "reads_videos", False):
            raise ValueError(
                f"task {self.name} needs a model that reads several frames and writes text, a "
                "BlipForQuestionAnswering (zoo:tiny-blip@vqa), and "
                f"{loaded.name} is a {type(loaded.model).__name__}."
            )
        super().__init__(options, data, loaded, seed, progress)
