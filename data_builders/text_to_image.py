"""Any text-to-image pipeline of diffusers: pictures of prompts, each from a seed of its own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.suggestions import did_you_mean

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SCHEMES = "hf:REPOSITORY, hf:./FOLDER, zoo:NAME or random:NAME"
ENDLESS = 10**6  # what tokenizers state that have no length of their own is longer


@dataclass(frozen=True)
class Drawn:
    """A picture.

    Attributes:
        pixels: [h, w, 3], uint8.
        nsfw: whether the pipeline's safety checker flagged it; None where it has none.
    """

    pixels: np.ndarray
    nsfw: bool | None = None


class TextToImage:
    """Draws pictures.

    The noise of a picture is drawn on the CPU by a generator of its own, so it depends neither on
    the device nor on what else is in the batch. (What is computed from it does in its last bits.)

    Args:
        name: one of `SCHEMES`; of hf, anything that `DiffusionPipeline.from_pretrained` reads.
        dtype: of the weights.
        device: where it runs.
        scheduler: name of a class of diffusers, in place of the pipeline's own.
        scheduler_options: in place of what its config says.
        variant: of the weights' files, such as "fp16".
        seed: of random weights.

    Raises:
        ValueError: it cannot be loaded, is no text-to-image pipeline, or does not go with the
            scheduler.
    """

    def __init__(
        self,
        name: str,
        dtype: str = "float32",
        device: str = "cpu",
        scheduler: str | None = None,
        scheduler_options: Mapping[str, Any] | None = None,
        variant: str | None = None,
        seed: int = 0,
    ) -> None:
        self.name, self.device = name, device
        pipeline = _loaded(name, dtype, device, variant, seed)
        self.accepts = inspect.signature(pipeline.__call__).parameters
        if "prompt" not in self.accepts:
            raise ValueError(f"{name} draws no picture of a text: {type(pipeline).__name__}")
        if scheduler is not None or scheduler_options:
            pipeline.scheduler = _scheduler(pipeline, scheduler, scheduler_options or {})
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline: Any = pipeline.to(device)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], **settings: Any) -> list[Drawn]:
        """One picture of each prompt, computed as one batch.

        Args:
            prompts: at least one.
            seeds: of the noise, one each.
            settings: of the pipeline's call, such as guidance_scale=7.5; a negative prompt is one
                text for all. None leaves the pipeline's own default.

        Raises:
            ValueError: a setting that the pipeline does not take, or too large a batch.
        """
        import torch

        given = {key: value for key, value in settings.items() if value is not None}
        if unknown := [key for key in given if key not in self.accepts]:
            raise ValueError(
                f"{self.name} ({type(self.pipeline).__name__}) takes no {', '.join(unknown)}; "
                "leave it out (null)"
            )
        if "negative_prompt" in given:
            given["negative_prompt"] = [given["negative_prompt"]] * len(prompts)
        direct = getattr(self.pipeline, "image_processor", None) is not None
        try:
            found = self.pipeline(
                prompt=list(prompts),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pt" if direct else "pil",
                **given,
            )
        except torch.cuda.OutOfMemoryError:
            raise ValueError(
                f"{len(prompts)} pictures at once do not fit into the memory of {self.device}; "
                "lower imagine.batch_size"
            ) from None
        pixels = _bytes(found.images) if direct else _pixels(found.images)
        flags = getattr(found, "nsfw_content_detected", None) or [None] * len(prompts)
        return [
            Drawn(one, None if flag is None else bool(flag))
            for one, flag in zip(pixels, flags, strict=True)
        ]

    def tokens(self, text: str) -> int:
        """Length of a prompt, by the tokenizer that reads most; special tokens included."""
        tokenizers = self._tokenizers()
        if not tokenizers:
            return 0
        return len(max(tokenizers, key=_length)(text)["input_ids"])

    @property
    def limit(self) -> int:
        """Tokens of a prompt that are read, by the tokenizer that reads most."""
        lengths = [_length(one) for one in self._tokenizers()]
        return max(lengths, default=ENDLESS)

    def _tokenizers(self) -> list[Any]:
        every = [getattr(self.pipeline, f"tokenizer{end}", None) for end in ("", "_2", "_3")]
        return [one for one in every if one is not None and _length(one) < ENDLESS]


def shortened(template: str, caption: str, drawer: TextToImage, **fields: str) -> tuple[str, bool]:
    """A prompt that is read whole: words are taken off the caption's end until it is.

    Args:
        template: with {caption} and the names of `fields`.
        caption: what is shortened.
        drawer: that reads the prompt.
        fields: what else the template holds.

    Returns:
        The prompt, and whether words are missing.
    """
    words = caption.split()

    def prompt(count: int) -> str:
        return template.format(caption=" ".join(words[:count]), **fields).strip()

    limit = drawer.limit
    # No tokenizer here makes more tokens than bytes, beside start, end and a leading space.
    if len(prompt(len(words)).encode()) + 3 <= limit or drawer.tokens(prompt(len(words))) <= limit:
        return prompt(len(words)), False
    low, high = 0, len(words) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if drawer.tokens(prompt(middle)) <= limit else (low, middle - 1)
    return prompt(low), True


def _length(tokenizer: Any) -> int:
    return int(tokenizer.model_max_length)


def _bytes(images: Tensor) -> list[np.ndarray]:
    """[n, 3, h, w] in [0, 1] to pixels, on their device; what is no number becomes black."""
    import torch

    scaled = images.float().nan_to_num(0.0, 0.0, 0.0).clamp(0, 1).mul(255).round()
    return list(scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())


def _pixels(images: Sequence[Any]) -> list[np.ndarray]:
    import numpy as np

    return [np.asarray(image.convert("RGB")) for image in images]


def _loaded(name: str, dtype: str, device: str, variant: str | None, seed: int) -> Any:
    from mmtune.backbones.loading import torch_dtype

    scheme, _, rest = name.partition(":")
    if scheme == "random" and rest:
        return _random(rest, torch_dtype(dtype), device, seed)
    if scheme not in ("hf", "zoo") or not rest:
        raise ValueError(f"no text-to-image pipeline {name!r}; expected {SCHEMES}")
    if scheme == "zoo":
        from mmtune import zoo

        try:
            return zoo.pipeline(rest).to(torch_dtype(dtype))
        except zoo.ZooError as error:
            raise ValueError(str(error)) from None
    if rest.startswith((".", "/")) and not Path(rest).is_dir():
        raise ValueError(f"{name}: there is no folder {Path(rest).absolute()}")
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(
            rest, torch_dtype=torch_dtype(dtype), variant=variant, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"{name} cannot be loaded as a pipeline of diffusers: {why} Expected {SCHEMES}."
        ) from None


def _random(rest: str, dtype: Any, device: str, seed: int) -> Any:
    """Random weights, drawn where they will be."""
    import torch

    from data_builders.random_pipelines import pipelines

    known = pipelines()
    if rest not in known:
        raise ValueError(
            f"no random pipeline {rest!r}; there are {', '.join(known)}.{did_you_mean(rest, known)}"
        )
    default, cuda = torch.get_default_dtype(), str(device).startswith("cuda")
    with torch.random.fork_rng([torch.device(device)] if cuda else []), torch.device(device):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            pipeline = known[rest]()
        finally:
            torch.set_default_dtype(default)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # as `from_pretrained` leaves them: T5 has dropout
    return pipeline


def _scheduler(pipeline: Any, name: str | None, options: Mapping[str, Any]) -> Any:
    """A scheduler with the config of the pipeline's own."""
    import diffusers

    own = pipeline.scheduler
    fitting = {cls.__name__: cls for cls in (type(own), *(own.compatibles or ()))}
    name = name or type(own).__name__
    if name not in fitting:
        there = "goes not with" if hasattr(diffusers, name) else "is no scheduler of diffusers, for"
        raise ValueError(
            f"imagine.scheduler: {name} {there} {type(pipeline).__name__} of this model; fitting "
            f"are {', '.join(sorted(fitting))}.{did_you_mean(name, fitting)}"
        )
    expected = inspect.signature(fitting[name].__init__).parameters
    if unknown := [key for key in options if key not in expected]:
        raise ValueError(
            f"imagine.scheduler_options: {name} takes no {', '.join(unknown)}; it takes "
            f"{', '.join(key for key in expected if key != 'self')}"
        )
    return fitting[name].from_config(own.config, **options)
