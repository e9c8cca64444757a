"""What a run does around its training steps: read images, rank answers, load and switch adapters.

    python -m mmtune.bench.around --workers 0,4,16 --out runs/bench

- images: JPEG files of photo size are decoded, cropped at random, and batched as for training;
- ranking: both directions of an evaluation of COCO's size (5,000 images, 25,000 captions), from
  features of random numbers, a chunk of queries at a time;
- adapters: of a tower of 24 layers, Aurora's and PEFT's LoRA.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmtune.bench import script
from mmtune.bench.timing import Timing, device_name, milliseconds, timed

if TYPE_CHECKING:
    from torch import nn

    from mmtune.data.records import MediaRef
    from mmtune.data.transforms import TrainTransform

BATCH = 64  # images that are put together


@dataclass(frozen=True)
class Around:
    """What is measured.

    Attributes:
        device: where answers are ranked.
        workers: processes that read images, such as "0,4".
        files: images that are read, again and again.
        pixels: of a file's longer edge.
        size: of what the model takes.
        passes: over the files; the first is not counted.
        queries: images of the evaluation; it has five captions for each.
        width: of features.
        layers: of the adapted tower.
        hidden: its width.
        rank: of adapters.
        runs: of what is short.
    """

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    workers: str = "0,2"
    files: int = 512
    pixels: int = 640
    size: int = 224
    passes: int = 3
    queries: int = 5000
    width: int = 768
    layers: int = 24
    hidden: int = 1024
    rank: int = 64
    runs: int = 5


@dataclass
class Measured:
    """What was found.

    Attributes:
        around: what it was found with.
        where: the device, processor cores, and the version of torch.
        images: workers -> images a second.
        ranking: milliseconds of both directions.
        ranking_bytes: taken on the device at most while ranking, beside the features; None on a
            CPU.
        adapters: what -> milliseconds.
    """

    around: Around
    where: str = ""
    images: dict[int, float] = field(default_factory=dict)
    ranking: Timing | None = None
    ranking_bytes: int | None = None
    adapters: dict[str, Timing] = field(default_factory=dict)


def image_rates(around: Around, folder: Path) -> dict[int, float]:
    """Images a second, by the number of processes that read them."""
    import numpy as np
    from PIL import Image
    from torch.utils.data import DataLoader

    from mmtune.backbones.base import ImageSpec
    from mmtune.data.pairs import PairDataset
    from mmtune.data.records import ImageFile, Record
    from mmtune.data.transforms import AugmentOptions, TrainTransform

    draw = np.random.default_rng(0)
    records = []
    for number in range(around.files):
        # Soft blots, about as dear to decode as a photo.
        coarse = draw.integers(0, 256, (around.pixels // 16, around.pixels // 12, 3), np.uint8)
        image = Image.fromarray(coarse).resize((around.pixels, around.pixels * 3 // 4), 3)
        name = f"{number}.jpg"
        image.save(folder / name, quality=90)
        records.append(Record(ImageFile(str(folder), name), ("a photo",), name, name))
    spec = ImageSpec(around.size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    transform = TrainTransform(spec, AugmentOptions(), seed=0)
    data = PairDataset(records, partial(_read, transform))
    rates = {}
    for workers in map(int, around.workers.split(",")):
        loader = DataLoader(
            data,
            batch_size=BATCH,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_pixels,
        )
        for _ in loader:  # processes start, files come into memory
            pass
        start = time.perf_counter()
        for _ in range(around.passes - 1):
            for _ in loader:
                pass
        seconds = time.perf_counter() - start
        rates[workers] = (around.passes - 1) * around.files / seconds
    return rates


def _read(transform: TrainTransform, ref: MediaRef, epoch: int, index: int) -> torch.Tensor:
    from mmtune.data.images import load_image

    return transform(load_image(ref), epoch, index)


def _pixels(pairs: Any) -> torch.Tensor:
    return torch.stack([pair.pixels for pair in pairs])


def ranking(around: Around) -> tuple[Timing, int | None]:
    """Both directions of an evaluation with five captions an image."""
    from mmtune.metrics.recall import Scores, rank_queries

    device = torch.device(around.device)
    torch.manual_seed(0)
    images, texts = (
        torch.nn.functional.normalize(torch.randn(n, around.width, device=device), dim=-1)
        for n in (around.queries, 5 * around.queries)
    )
    own = [range(5 * i, 5 * i + 5) for i in range(around.queries)]
    owner = [[i // 5] for i in range(5 * around.queries)]

    def both() -> None:
        rank_queries(Scores(images, texts), own)
        rank_queries(Scores(texts, images), owner)

    both()
    if device.type != "cuda":
        return timed(both, device, around.runs, warm=0), None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    found = timed(both, device, around.runs, warm=0)
    return found, torch.cuda.max_memory_allocated(device) - before


def adapter_times(around: Around) -> dict[str, Timing]:
    """Loading an adapter beside another, and switching between two."""
    from peft import LoraConfig, get_peft_model

    from mmtune.tuners.registry import apply, method

    names = ["q_proj", "k_proj", "v_proj", "out_proj"]
    lora = LoraConfig(r=around.rank, target_modules=rf".*vision_model.*({'|'.join(names)})")
    aurora = method("aurora").options(rank=around.rank, branches=["vision"])
    made: dict[str, Callable[[nn.Module], Any]] = {
        "aurora": lambda model: apply(model, "aurora", aurora),
        "PEFT LoRA": lambda model: get_peft_model(model, lora),  # type: ignore[arg-type]
    }
    found = {}
    for name, make in made.items():
        wrapped = make(_tower(around))
        with tempfile.TemporaryDirectory() as folder:
            wrapped.save_pretrained(folder)
            loads = []
            for number in range(around.runs):
                load = partial(wrapped.load_adapter, folder, f"a{number}", torch_device="cpu")
                loads.append(milliseconds(load, torch.device("cpu")))
        for number in range(2, around.runs):
            wrapped.delete_adapter(f"a{number}")
        turns = iter(range(10**9))
        switch = lambda: wrapped.set_adapter(f"a{next(turns) % 2}")  # noqa: E731, B023
        found[f"{name}: load"] = Timing.of(loads)
        found[f"{name}: switch"] = timed(switch, torch.device("cpu"), 10 * around.runs)
    return found


def _tower(around: Around) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config={
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2,
        },
        vision_config={
            "hidden_size": around.hidden, "intermediate_size": 64, "image_size": 28,
            "num_hidden_layers": around.layers, "num_attention_heads": 2, "patch_size": 14,
        },
    )  # fmt: skip
    return CLIPModel(config)


def measure(around: Around) -> Measured:
    """Everything, one after the other."""
    import os

    name = device_name(around.device)
    found = Measured(around, f"{name}, {os.cpu_count()} cores, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        found.images = image_rates(around, Path(folder))
    found.ranking, found.ranking_bytes = ranking(around)
    found.adapters = adapter_times(around)
    return found


def table(found: Measured) -> str:
    """Markdown: one line for each thing."""
    around = found.around
    memory = found.ranking_bytes
    beside = "" if memory is None else f", {memory / 2**20:.0f} MiB beside the features"
    size = f"{around.queries:,} x {5 * around.queries:,}"
    lines = [
        f"images/s, {workers} workers | {rate:.0f} ({rate / max(1, workers):.0f} a process)"
        for workers, rate in found.images.items()
    ]
    lines.append(f"ranking {size}, both directions{beside} | {found.ranking}")
    lines += [f"{what} | {time}" for what, time in found.adapters.items()]
    return "\n".join(
        [
            f"{found.where}; JPEG files of {around.pixels} x {around.pixels * 3 // 4}, cropped to "
            f"{around.size} px; adapters of {around.layers} layers, rank {around.rank}",
            "",
            "| what | measured |",
            "|---|---|",
            *(f"| {line} |" for line in lines),
        ]
    )


main = partial(script.main, "around", __doc__, Around, measure, table)


if __name__ == "__main__":
    main()
