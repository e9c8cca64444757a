"""What tasks on images and videos share: checked data, and pixels to train on and to evaluate."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

from mmtune.batched import batched
from mmtune.data.frames import FrameInputs
from mmtune.data.images import load_image
from mmtune.data.options import DataOptions
from mmtune.data.records import DataError, MediaRef, Problem, Question, Record
from mmtune.data.texts import report_too_long
from mmtune.data.transforms import EvalTransform, TrainTransform
from mmtune.tasks.base import Task, device_of, dtype_of, first_process

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from mmtune.backbones.base import Loaded
    from mmtune.data.pairs import NoSamples, PairDataset
    from mmtune.data.questions import QuestionDataset

DECODERS = 4  # threads; decoding and resizing leave Python's lock


class MediaTask(Task):
    """A task on images, or on videos, with texts.

    Args:
        options: with `augment` and `eval_batch_size` among its fields.
        data: train, val and test sources; every image is decoded once here, before training.
        loaded: the model with its tokenizer and image specification.
        seed: of what is random in training samples.
        progress: draw a progress bar while checking the data.

    Raises:
        DataError: bad records, with `on_error: raise`; or a source that cannot be read.
    """

    kind: ClassVar[type[Record] | type[Question]]  # of the records
    videos: ClassVar[bool] = False  # whether records may be about videos

    def __init__(
        self,
        options: Any,
        data: DataOptions,
        loaded: Loaded,
        seed: int,
        progress: bool = True,
    ) -> None:
        from mmtune.data.checking import load_data

        self.settings, self.loaded, self.seed = options, loaded, seed
        self.splits = load_data(data, progress and first_process(), self.kind, self.videos)
        self.data_files = [f for split in self.splits.values() for f in split.files]
        self.truncated = report_too_long(
            (t for split in self.splits.values() for r in split.records for t in self._texts(r)),
            loaded.count_tokens,
            loaded.context_length,
        )
        self.eval_transform = EvalTransform(loaded.image)
        self.train_transform = None
        if options.augment is not None:
            self.train_transform = TrainTransform(loaded.image, options.augment, seed)
        self._samples = self._train_samples()
        self.train_dataset: Dataset = self._samples

    @abstractmethod
    def _texts(self, record: Any) -> Sequence[str]:
        """The texts of a record that the model reads."""

    @abstractmethod
    def _dataset(self, records: Sequence[Any]) -> PairDataset | QuestionDataset:
        """Training samples of records."""

    def _train_samples(self) -> PairDataset | QuestionDataset | NoSamples:
        from mmtune.data.pairs import NoSamples

        return self._dataset(self._records("train")) if "train" in self.splits else NoSamples()

    def _records(self, split: str) -> list[Any]:
        if split not in self.splits:
            have = ", ".join(self.splits) or "none"
            raise DataError([Problem("config", f"data.{split} is not set", f"there are: {have}")])
        return self.splits[split].records

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation of `epoch`, and what else differs between epochs."""
        self._samples.epoch = epoch

    def train_pixels(self, ref: MediaRef, epoch: int, index: int) -> Tensor:
        """[3, s, s] of sample `index`: an image, augmented where the options say so."""
        if self.train_transform is None:
            return self.eval_pixels(ref)
        return self.train_transform(load_image(ref), epoch, index)

    def eval_pixels(self, ref: MediaRef) -> Tensor:
        """[3, s, s] of one image, as evaluation sees it."""
        return self.eval_transform(load_image(ref))

    def _in_dtype(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch with its pixels in the dtype that the stock model takes."""
        return {**batch, "pixel_values": batch["pixel_values"].to(dtype_of(self.loaded.model))}

    def _pixels(self, model: nn.Module, records: Sequence[Record | Question]) -> Iterator[Tensor]:
        """[b, 3, s, s] of `eval_batch_size` records at a time, on the model's device, as its dtype.

        [b, f, 3, s, s] of videos.
        """
        import torch

        device, dtype = device_of(model), dtype_of(self.loaded.model)
        with ThreadPoolExecutor(DECODERS) as pool:
            for chunk in batched(records, self.settings.eval_batch_size):
                pixels = pool.map(self.eval_pixels, [r.image for r in chunk])
                yield torch.stack(list(pixels)).to(device, dtype)


class CaptionedTask(MediaTask):
    """A task on images, or on videos, with captions; arguments as `MediaTask`.

    The options have `captions` too. The seed also decides the order in which captions take turns.
    """

    kind: ClassVar[type[Record]] = Record

    def _texts(self, record: Record) -> Sequence[str]:
        return record.captions

    def _dataset(self, records: Sequence[Record]) -> PairDataset:
        from mmtune.data.pairs import PairDataset

        return PairDataset(records, self.train_pixels, self.settings.captions, self.seed)


class VideoTask(MediaTask):
    """A task on videos, [b, f, 3, s, s] where images are [b, 3, s, s]; arguments as `MediaTask`.

    The options are `FrameOptions` too. Every video is opened once before training.
    """

    videos: ClassVar[bool] = True

    def __init__(
        self,
        options: Any,
        data: DataOptions,
        loaded: Loaded,
        seed: int,
        progress: bool = True,
    ) -> None:
        self.frames = FrameInputs(options, loaded.image, options.augment, seed)
        super().__init__(options, data, loaded, seed, progress)

    def train_pixels(self, ref: MediaRef, epoch: int, index: int) -> Tensor:
        """[frames, 3, s, s] of sample `index`: a video, augmented where the options say so."""
        return self.frames.training(ref, epoch, index)

    def eval_pixels(self, ref: MediaRef) -> Tensor:
        """[eval_frames, 3, s, s] of one video, as evaluation sees it."""
        return self.frames.evaluation(ref)
