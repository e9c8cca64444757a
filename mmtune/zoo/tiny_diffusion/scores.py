"""Whether what is drawn shows what was asked for, and whether it was only remembered."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.zoo.tiny_blip.scores import Score, ratio
from mmtune.zoo.tiny_clip.captions import text_groups
from mmtune.zoo.tiny_clip.teachers import load_efficientnet
from mmtune.zoo.tiny_diffusion.material import drawings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BATCH = 64
SMALL = 32  # pixels at which pictures are compared one by one
TEACHER_SIZE = 144


@dataclass(frozen=True)
class Asked:
    """Prompts with the real drawing of each.

    Attributes:
        prompts: n texts.
        real: uint8 [n, 3, s, s], the drawings that have these captions.
        groups: n numbers; equal for equal prompts.
    """

    prompts: list[str]
    real: Tensor
    groups: list[int]


def asked(name: str, split: str, limit: int = 0) -> Asked:
    """Captions and drawings of a split; `limit` draws so many of them, always the same."""
    import torch

    rows, pixels = drawings(name, split)
    chosen = sorted(random.Random(0).sample(range(len(rows)), min(limit or len(rows), len(rows))))
    rows = [rows[i] for i in chosen]
    return Asked([row["caption"] for row in rows], pixels[torch.tensor(chosen)], text_groups(rows))


def draw(pipeline: Any, prompts: Sequence[str], seed: int, steps: int, guidance: float) -> Tensor:
    """One picture of each prompt by the stock call: uint8 [n, 3, s, s] on the CPU.

    The noise of prompt i depends on `seed` and i alone.
    """
    import numpy as np
    import torch

    found = []
    for start in range(0, len(prompts), BATCH):
        some = list(prompts[start : start + BATCH])
        numbers = range(start, start + len(some))
        generators = [torch.Generator().manual_seed(100_003 * seed + i) for i in numbers]
        images = pipeline(
            prompt=some,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
        ).images
        found.append(torch.from_numpy(np.round(255 * images).astype("uint8")))
    return torch.cat(found).permute(0, 3, 1, 2).contiguous()


def cpu_seconds(pipeline: Any, steps: int, guidance: float) -> float:
    """Seconds of one CPU core that a picture takes, in a batch of eight."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    draw(pipeline, ["a red apple"] * 8, 0, 2, guidance)  # the first pass is slower
    began = time.process_time()
    draw(pipeline, ["a red apple"] * 8, 0, steps, guidance)
    took = (time.process_time() - began) / 8
    torch.set_num_threads(threads)
    return round(took, 2)


class ClipJudge:
    """A CLIP of the zoo; its text tower is also what the prompts are read by."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import CLIPTokenizer

        from mmtune.zoo.score_tiny_clip import load

        self.model, self.device = load(folder).to(device), device
        self.tokenizer = CLIPTokenizer.from_pretrained(str(folder))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors, [n, e]."""
        import torch
        from torch.nn import functional as F

        length = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        ).input_ids.to(self.device)
        with torch.no_grad():
            seen = [self.model.text_model(input_ids=some).pooler_output for some in ids.split(256)]
            return F.normalize(self.model.text_projection(torch.cat(seen)), dim=-1).cpu()

    def images(self, pixels: Tensor) -> Tensor:
        """Unit vectors of uint8 [n, 3, s, s]: [n, e]."""
        from torch.nn import functional as F

        def see(shown: Tensor) -> Tensor:
            return self.model.visual_projection(
                self.model.vision_model(pixel_values=shown).pooler_output
            )

        size = self.model.config.vision_config.image_size
        return F.normalize(_each(pixels, size, self.device, see), dim=-1)


class PictureJudge:
    """EfficientNet-Lite0 (ImageNet), which has seen neither prompts nor drawings.

    Args:
        teachers: folder below which its package is unpacked.
        usual: uint8 [n, 3, s, s], pictures whose features are the origin and unit.
        device: where it runs.
    """

    def __init__(self, teachers: Path, usual: Tensor, device: torch.device) -> None:
        self.network, self.device = load_efficientnet(teachers).to(device), device
        features = self._features(usual)
        self.mean, self.deviation = features.mean(dim=0), features.std(dim=0) + 1e-6

    def images(self, pixels: Tensor) -> Tensor:
        """Unit vectors of uint8 [n, 3, s, s]: [n, f]."""
        from torch.nn import functional as F

        return F.normalize((self._features(pixels) - self.mean) / self.deviation, dim=-1)

    def _features(self, pixels: Tensor) -> Tensor:
        def see(shown: Tensor) -> Tensor:
            return self.network.forward_features(shown).mean(dim=(2, 3))

        return _each(pixels, TEACHER_SIZE, self.device, see)


def _each(pixels: Tensor, size: int, device: torch.device, see: Any) -> Tensor:
    """What is seen in uint8 pictures, resized, in [-1, 1], in chunks: on the CPU."""
    import torch
    from torch.nn import functional as F

    found = []
    with torch.no_grad():
        for some in pixels.split(256):
            shown = some.to(device).float()
            if shown.shape[-1] != size:
                shown = F.interpolate(shown, size=size, mode="bicubic", antialias=True)
            found.append(see(shown.clamp(0, 255) / 127.5 - 1).float().cpu())
    return torch.cat(found)


def matches(similarity: Tensor, groups: Sequence[int]) -> dict[str, Score]:
    """How much nearer pictures are to what belongs to them than to what belongs to others.

    Args:
        similarity: of picture i of every seed with target j; target i belongs to picture i.
        groups: n numbers, equal for equal prompts; targets of equal prompts are all right.

    Returns:
        "own": the mean similarity times 100, "others": with the targets of other prompts (what
        shuffling gives in the mean), "difference": of the two, paired, and "R@1", "R@10": percent
        of pictures whose best right target is among the first; "chance R@1" likewise by chance.
        Intervals are bootstraps over prompts.

    Shape:
        similarity [seeds, n, n].
    """
    import torch

    number = torch.tensor(groups)
    right = number[:, None] == number[None, :]
    values = similarity.double()
    own = values.diagonal(dim1=1, dim2=2).mean(dim=0)
    others = (values * ~right).sum(dim=2).mean(dim=0) / (~right).sum(dim=1)
    best = values.masked_fill(~right, -torch.inf).amax(dim=2, keepdim=True)
    rank = ((values > best) & ~right).sum(dim=2)
    ones = torch.ones(len(own)).numpy()
    found = {"own": own, "others": others, "difference": own - others}
    found |= {f"R@{k}": (rank < k).double().mean(dim=0) for k in (1, 10)}
    found["chance R@1"] = right.double().mean(dim=1)
    return {name: ratio(value.numpy(), ones) for name, value in found.items()}


def small(pixels: Tensor, device: torch.device) -> Tensor:
    """Pictures in [0, 1] at `SMALL` pixels, flattened: [n, 3 * 32 * 32]."""
    import torch
    from torch.nn import functional as F

    found = [
        F.interpolate(some.to(device).float() / 255, size=SMALL, mode="area").flatten(1)
        for some in pixels.split(512)
    ]
    return torch.cat(found)


def nearest(pixels: Tensor, known: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The training picture nearest to each picture, mirrored or not.

    Args:
        pixels: uint8 [n, 3, s, s].
        known: uint8 [m, 3, s, s].
        device: where it is computed.

    Returns:
        Root mean square difference at `SMALL` pixels of values in [0, 1], and its number: [n].
    """
    import torch

    shown, ways = small(pixels, device), (known, known.flip(3))
    distances = [torch.cdist(shown, small(way, device)) for way in ways]
    distance, number = torch.minimum(*distances).min(dim=1)
    return (distance / shown.shape[1] ** 0.5).cpu(), number.cpu()


def copies(distances: Tensor, limit: float) -> Score:
    """Percent of pictures that are nearer than `limit` to a training picture; [seeds, n]."""
    import numpy as np

    return ratio((distances < limit).double().mean(dim=0).numpy(), np.ones(distances.shape[1]))
