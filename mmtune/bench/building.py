"""How fast the pictures of a build are drawn, against the pipeline that draws them alone.

    python -m mmtune.bench.building --pixels 512 --out runs/bench

Stable Diffusion 2.1 in full size with random weights, which make pictures no faster or slower.

- bare: the stock pipeline is called batch by batch, and what it returns is thrown away;
- bare, written: and each batch is written as PNG files before the next is begun;
- stage: `imagine` by diffusers, every picture from its own seed and on disk as PNG;
- filter: a CLIP of random weights reads those files and scores them.

A build that was stopped loads its models again, and draws the shard again that was not finished.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_builders.pictures import MADE, Pictures
from data_builders.samples import Sample
from data_builders.stages.base import Context
from data_builders.stages.filter import Clip, ClipOptions
from data_builders.stages.imagine import Diffusers, DiffusersOptions
from data_builders.text_to_image import TextToImage
from editing.config import EditModelOptions
from mmtune.bench import script
from mmtune.bench.timing import device_name

CAPTIONS = (
    "a brown dog runs over a field with a ball in its mouth",
    "two women sit at a table in front of a window",
    "a red bus stops at the side of a road in the rain",
    "a cat sleeps on a chair beside an open book",
)


@dataclass(frozen=True)
class Setup:
    """What is measured.

    Attributes:
        pipeline: its name.
        dtype: of the weights.
        device: where it runs.
        pixels: of a picture's edges.
        steps: of denoising.
        batches: sizes that the bare pipeline is tried with, such as "8,16"; the stage takes the
            best.
        images: that the stage draws; a shard.
        scorer: the CLIP.
    """

    pipeline: str = "random:sd21"
    dtype: str = "bfloat16"
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    pixels: int = 512
    steps: int = 20
    batches: str = "8,16,32"
    images: int = 192
    scorer: str = "hf:random:clip-vit-base-patch32"


@dataclass
class Measured:
    """What was found.

    Attributes:
        setup: what it was found with.
        where: the device's name, and the versions of torch and diffusers.
        bare: size of a batch -> pictures a second.
        rates: way -> pictures a second, at the best batch.
        loading: seconds until the first picture can be drawn, random weights included.
        bytes: of a PNG file, on average.
    """

    setup: Setup
    where: str = ""
    bare: dict[int, float] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    loading: float = 0.0
    bytes: float = 0.0

    @property
    def best(self) -> int:
        """The batch at which the bare pipeline is fastest."""
        return max(self.bare, key=lambda size: self.bare[size])


def seconds(run: Callable[[], Any], device: str) -> float:
    """How long a call takes, until the device has done all of it."""
    start = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def bare_rates(setup: Setup, found: Measured, folder: Path) -> None:
    """The stock pipeline, as loaded, with every size of batch; and with files at the best."""
    pipeline = TextToImage(setup.pipeline, setup.dtype, setup.device).pipeline

    def draw(size: int, steps: int = setup.steps) -> list[Any]:
        return pipeline(
            prompt=[CAPTIONS[i % len(CAPTIONS)] for i in range(size)],
            num_inference_steps=steps,
            guidance_scale=7.5,
            width=setup.pixels,
            height=setup.pixels,
            generator=torch.Generator(setup.device).manual_seed(0),
        ).images

    def write(size: int) -> None:
        for number, image in enumerate(draw(size)):
            image.save(folder / f"bare-{number}.png")

    for size in map(int, setup.batches.split(",")):
        draw(size, 2)  # kernels are chosen at first
        times = [seconds(lambda size=size: draw(size), setup.device) for _ in range(2)]
        found.bare[size] = size / min(times)
    found.rates["bare"] = found.bare[found.best]
    found.rates["bare, written"] = found.best / seconds(lambda: write(found.best), setup.device)


def stage_rates(setup: Setup, found: Measured, folder: Path) -> None:
    """The stages, at the batch that is best for the bare pipeline."""
    pictures = Pictures({MADE: folder})
    context = Context(0, EditModelOptions("none"), pictures, folder, setup.device)
    options = DiffusersOptions(
        pipeline=setup.pipeline,
        dtype=setup.dtype,  # type: ignore[arg-type]
        steps=setup.steps,
        width=setup.pixels,
        height=setup.pixels,
        images=4,
        batch_size=found.best,
    )
    imagine = Diffusers(options, context)
    found.loading = seconds(imagine.open, setup.device)

    def samples(name: str, images: int) -> list[Sample]:
        count = max(1, images // options.images)
        every = [CAPTIONS[i % len(CAPTIONS)] for i in range(count)]
        return [
            Sample(f"{name}{i}", "What is it?", captions=(text,)) for i, text in enumerate(every)
        ]

    imagine.run(samples("warm", found.best))
    shard, drawn = samples("timed", setup.images), []
    taken = seconds(lambda: drawn.extend(imagine.run(shard)), setup.device)
    files = [pictures.file(c.image) for sample in drawn for c in sample.candidates]
    found.rates["stage"] = len(files) / taken
    found.bytes = sum(len(file.read()) for file in files) / len(files)
    score = Clip(ClipOptions(model=setup.scorer), context)
    score.open()
    score.run(drawn[:2])
    found.rates["filter"] = len(files) / seconds(lambda: score.run(drawn), setup.device)


def measure(setup: Setup) -> Measured:
    """Everything, with one pipeline in memory at a time."""
    import diffusers

    name = device_name(setup.device)
    found = Measured(setup, f"{name}, torch {torch.__version__}, diffusers {diffusers.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        bare_rates(setup, found, Path(folder))
        if setup.device.startswith("cuda"):
            torch.cuda.empty_cache()
        stage_rates(setup, found, Path(folder))
    return found


def table(found: Measured) -> str:
    """Markdown: pictures a second of every way, and what a restart costs."""
    setup, rates = found.setup, found.rates
    tried = ", ".join(f"{size}: {rate:.3g}" for size, rate in found.bare.items())
    lost = setup.images / 2 / rates["stage"]
    return "\n".join(
        [
            f"{setup.pipeline}, {setup.dtype}, {setup.pixels} px, {setup.steps} steps, guidance "
            f"7.5, {found.where}",
            "",
            "| way | pictures/s | against bare |",
            "|---|---|---|",
            *(
                f"| {way} | {rate:.3g} | {rate / rates['bare']:.2f}x |"
                for way, rate in rates.items()
            ),
            "",
            f"Bare by size of batch: {tried}. A PNG has {found.bytes / 1e3:.0f} kB.",
            f"A restart loads the pipeline in {found.loading:.1f} s (weights drawn, not read) and "
            f"draws {lost:.0f} s of a shard of {setup.images} pictures again, on average.",
        ]
    )


main = partial(script.main, "building", __doc__, Setup, measure, table)


if __name__ == "__main__":
    main()
