"""The best of a sample's pictures that shows what it should and is not its own image again."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from data_builders.looks import Look, colour, contrast
from data_builders.samples import Candidate, Outcome, Rejected, Sample
from data_builders.stages.base import Stage
from editing.ranges import Cosine, Count
from mmtune.data.records import ImageProblem

if TYPE_CHECKING:
    from torch import Tensor

    from data_builders.image_scores import ImageScorer

READERS = 4  # threads that read pictures while others are scored
NSFW, SAME = "flagged as not safe for work", "the source image again"
OTHER_TEXT, OTHER_IMAGE, COPY = "unlike its text", "unlike the source image", "nearly a copy"
BLANK = "blank image"


@dataclass(frozen=True)
class ClipOptions:
    """Settings of a filter by CLIP; null turns a threshold off.

    Attributes:
        model: for `mmtune.backbones.load`, such as open_clip:…, hf:… or zoo:tiny-clip.
        dtype: of its weights.
        min_text: least cosine of a picture and the text that it was made from.
        min_image, max_image: least and largest cosine of a picture and the sample's own image.
        min_contrast: least standard deviation of a picture's pixels, of 0..255, about their mean
            colour; below it there is nothing to see.
        near: two pictures are the same where both halves of their hashes differ in no more bits, of
            64; see `data_builders.near_duplicates`.
        best_by: of those that pass the one is chosen that is nearest to its text, or to the image.
        batch_size: pictures scored at once.
    """

    model: str = "open_clip:ViT-B-32/openai"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    min_text: Cosine | None = 0.22
    min_image: Cosine | None = 0.5
    max_image: Cosine | None = 0.97
    min_contrast: Annotated[float, Field(ge=0, le=127.5)] = 4.0
    near: Annotated[int, Field(ge=0, le=64)] | None = 6
    best_by: Literal["text", "image"] = "text"
    batch_size: Count = 64

    def __post_init__(self) -> None:
        low, high = self.min_image, self.max_image
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_image must not exceed max_image, got {low} and {high}")


@dataclass(frozen=True)
class _Seen:
    """What is kept of a picture that was read.

    Attributes:
        look: tells whether it is another's.
        contrast: of its pixels.
        colour: what it is called if there is nothing to see.
        pixels: as the scorer reads them.
    """

    look: Look
    contrast: float
    colour: str
    pixels: Tensor


class Clip(Stage[ClipOptions]):
    """A CLIP scores every candidate; the best of those that pass is the generality image."""

    slot: ClassVar[str] = "filter"
    name: ClassVar[str] = "clip"
    options: ClassVar[type] = ClipOptions

    scorer: ImageScorer

    def open(self) -> None:
        from data_builders.image_scores import ImageScorer

        own = self.settings
        self.scorer = ImageScorer(own.model, own.dtype, self.context.device, own.batch_size)

    def run(self, samples: Sequence[Sample]) -> list[Outcome]:
        references = [ref for s in samples for ref in (s.image, *(c.image for c in s.candidates))]
        every = list(dict.fromkeys(filter(None, references)))
        with ThreadPoolExecutor(READERS) as readers:
            reading = {reference: readers.submit(self._seen, reference) for reference in every}
            vectors = self._vectors(reading)
        seen = {reference: future.result() for reference, future in reading.items()}
        texts = list(dict.fromkeys(c.prompt for s in samples for c in s.candidates))
        prompts = dict(zip(texts, self.scorer.texts(texts), strict=True))
        outcomes = []
        for sample in samples:
            own = seen.get(sample.image)
            if isinstance(own, ImageProblem):
                outcomes.append(Rejected(sample.id, own.reason, str(own), fault=True))
                continue
            judged = []
            for one in sample.candidates:
                scored = self._scored(one, sample.image, vectors, prompts, seen[one.image])
                judged.append(self._judged(scored, seen[one.image], own))
            outcomes.append(self._outcome(sample, judged))
        return outcomes

    def _seen(self, reference: str) -> _Seen | ImageProblem:
        import numpy as np

        pictures = self.context.pictures
        try:
            picture = pictures.load(reference)
            look = Look.of(pictures, reference, picture)
        except ImageProblem as problem:
            return problem
        pixels = np.asarray(picture)
        return _Seen(look, contrast(pixels), colour(pixels), self.scorer.prepared(picture))

    def _vectors(self, reading: dict[str, Future[Any]]) -> dict[str, Tensor]:
        """Reference -> unit vector, of pictures that could be read."""
        names: list[str] = []

        def pixels() -> Iterator[Tensor]:
            for reference, future in reading.items():
                found = future.result()
                if isinstance(found, _Seen):
                    names.append(reference)
                    yield found.pixels

        vectors = self.scorer.images(pixels())
        return dict(zip(names, vectors, strict=True))

    def _scored(
        self,
        candidate: Candidate,
        image: str,
        vectors: dict[str, Tensor],
        prompts: dict[str, Tensor],
        seen: _Seen | ImageProblem,
    ) -> Candidate:
        """With its scores; one that cannot be read has none."""
        if isinstance(seen, ImageProblem):
            return candidate
        vector = vectors[candidate.image]
        scores = {
            "contrast": round(seen.contrast, 2),
            "clip_text": round(float(vector @ prompts[candidate.prompt]), 4),
        }
        if image in vectors:
            scores["clip_image"] = round(float(vector @ vectors[image]), 4)
        return dataclasses.replace(candidate, scores={**candidate.scores, **scores})

    def _judged(
        self, candidate: Candidate, seen: _Seen | ImageProblem, own: _Seen | None
    ) -> Candidate:
        """With the first reason there is for turning it down."""
        if isinstance(seen, ImageProblem):
            return dataclasses.replace(candidate, reason=seen.reason)
        settings, scores = self.settings, candidate.scores
        text, image = scores["clip_text"], scores.get("clip_image")
        near = settings.near
        checks = (
            (NSFW, scores.get("nsfw", 0.0) > 0),
            (f"{BLANK}: {seen.colour}", scores["contrast"] < settings.min_contrast),
            (SAME, own is not None and own.look.digest == seen.look.digest),
            (SAME, own is not None and near is not None and own.look.same(seen.look, near)),
            (OTHER_TEXT, _less(text, settings.min_text)),
            (OTHER_IMAGE, _less(image, settings.min_image)),
            (COPY, _less(settings.max_image, image)),
        )
        reason = next((reason for reason, is_so in checks if is_so), "")
        return dataclasses.replace(candidate, reason=reason)

    def _outcome(self, sample: Sample, judged: Sequence[Candidate]) -> Outcome:
        good = [one for one in judged if not one.reason]
        by = f"clip_{self.settings.best_by}"
        if good:
            best = max(good, key=lambda one: one.scores.get(by, one.scores["clip_text"]))
            others = tuple(one for one in judged if one is not best)
            return sample.with_(candidates=(best, *others), image_rephrase=best.image)
        if not judged:
            return Rejected(sample.id, "no image to choose from", f"of {sample.question!r}")
        reasons = Counter(one.reason for one in judged)
        text = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
        broken = all(not one.scores or one.reason.startswith(BLANK) for one in judged)
        kind = reasons.most_common(1)[0][0]
        return Rejected(sample.id, f"no image passes: {kind}", text + _best(judged), broken)


def _less(value: float | None, bound: float | None) -> bool:
    """Whether it is, where there are both."""
    return value is not None and bound is not None and value < bound


def _best(judged: Sequence[Candidate]) -> str:
    """The scores of the candidate that is nearest to its text."""
    scored = [one for one in judged if "clip_text" in one.scores]
    if not scored:
        return ""
    best = max(scored, key=lambda one: one.scores["clip_text"])
    shown = ", ".join(f"{name} {value:g}" for name, value in best.scores.items())
    return f"; the nearest to its text, {best.image}: {shown}"


STAGES: tuple[type[Stage[Any]], ...] = (Clip,)
