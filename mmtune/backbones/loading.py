"""Models by name: zoo:tiny-clip, open_clip:ViT-B-16/openai, hf:openai/clip-vit-base-patch16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.backbones.base import ImageSpec, Loaded

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SCHEMES = {
    "zoo": "zoo:NAME[@FLAVOUR], a model that ships (mmtune list backbones)",
    "open_clip": "open_clip:ARCHITECTURE[/PRETRAINED_TAG] or open_clip:/local/folder",
    "hf": "hf:REPOSITORY or hf:./FOLDER, a transformers model (hf:random:NAME: random weights)",
}


def load(name: str, dtype: str = "float32") -> Loaded:
    """Load a model with its tokenizer and image specification.

    Args:
        name: one of the forms in `SCHEMES`. An open_clip architecture without a tag gets random
            weights.
        dtype: float32, bfloat16 or float16: the dtype of the weights.

    Raises:
        ValueError: an unknown form, architecture, tag or dtype; the message lists what there is.
    """
    scheme, rest = _parts(name)
    loaders: dict[str, Callable[[str], Loaded]] = {"zoo": _zoo, "open_clip": _open_clip, "hf": _hf}
    loaded = loaders[scheme](rest)
    loaded.model.to(torch_dtype(dtype))
    return loaded


def _parts(name: str) -> tuple[str, str]:
    scheme, _, rest = name.partition(":")
    if scheme not in SCHEMES or not rest:
        raise ValueError(f"no model {name!r}; expected " + "; ".join(SCHEMES.values()))
    return scheme, rest


def untrained(name: str) -> str:
    """The name of the same architecture with random weights; the zoo's models stay as they are."""
    scheme, rest = _parts(name)
    if scheme == "open_clip" and not Path(rest).is_dir():
        return f"open_clip:{rest.partition('/')[0]}"
    if scheme == "hf":
        return f"hf:random:{rest.removeprefix('random:')}"
    return name


def shell(name: str, dtype: str = "float32") -> Loaded:
    """The architecture of a model, on the meta device: it has sizes and takes no memory.

    The zoo's models and local open_clip folders, which are at hand, are loaded as they are.

    Raises:
        ValueError, OSError: see `load`; or the architecture is not known without a hub.
    """
    import torch

    scheme, rest = _parts(name)
    at_hand = scheme == "zoo" or (scheme == "open_clip" and Path(rest).is_dir())
    with nullcontext() if at_hand else torch.device("meta"):
        return load(untrained(name), dtype)


def torch_dtype(name: str) -> torch.dtype:
    """float32, bfloat16 or float16 as a torch dtype. Raises ValueError for another name."""
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}, got {name!r}")
    return known[name]


def _zoo(rest: str) -> Loaded:
    from mmtune import zoo

    name, _, flavour = rest.partition("@")
    return zoo.load(name, flavour or None)


def _open_clip(rest: str) -> Loaded:
    import open_clip

    if Path(rest).is_dir():
        return open_clip_loaded(f"local-dir:{rest}", None, f"open_clip:{rest}")
    architecture, _, tag = rest.partition("/")
    if architecture not in open_clip.list_models():
        raise ValueError(
            f"open_clip has no model {architecture!r}; it has {', '.join(open_clip.list_models())}"
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag and tag not in tags:
        raise ValueError(
            f"open_clip has no weights {tag!r} for {architecture}; it has {', '.join(tags)}"
        )
    return open_clip_loaded(architecture, tag or None, f"open_clip:{rest}")


def open_clip_loaded(source: str, tag: str | None, name: str) -> Loaded:
    """A stock open_clip model: `source` is an architecture or `local-dir:FOLDER`."""
    import open_clip
    import torch

    from mmtune.backbones import backbone_of

    # open_clip moves the model to its own default device, which a meta tensor cannot follow.
    model, _, preprocess = open_clip.create_model_and_transforms(
        source, pretrained=tag, device=torch.get_default_device()
    )
    tokenizer = open_clip.get_tokenizer(source)
    settings: Any = getattr(
        preprocess, "preprocess_cfg", None
    ) or open_clip.get_model_preprocess_cfg(model)
    size = settings["size"]
    spec = ImageSpec(
        size=size if isinstance(size, int) else size[0],
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        interpolation=settings.get("interpolation", "bicubic"),
        resize=settings.get("resize_mode", "shortest"),
    )
    length = int(getattr(model, "context_length", 77))
    return Loaded(
        model=model.eval(),
        backbone=backbone_of(model),
        image=spec,
        tokenize=lambda texts: {"input_ids": tokenizer(list(texts), context_length=length)},
        context_length=length,
        name=name,
        count_tokens=_open_clip_counter(tokenizer),
    )


def _open_clip_counter(tokenizer: Any) -> Callable[[str], int]:
    """`encode` leaves out the two special tokens; an HF tokenizer adds its own."""
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is not None and callable(inner):
        call: Any = inner
        return lambda text: len(call(text)["input_ids"])
    return lambda text: len(tokenizer.encode(text)) + 2


def _hf(rest: str) -> Loaded:
    from transformers import AutoImageProcessor, AutoTokenizer

    from mmtune.backbones.architectures import architecture

    source = rest.removeprefix("random:")
    random, folder = source != rest, Path(source).is_dir()
    known = architecture(source) if random and not folder else None
    if known is not None:
        return hf_loaded(known.model(), known.tokenizer(), known.image, f"hf:{rest}")
    if source.startswith((".", "/")) and not folder:
        raise ValueError(
            f"there is no folder {source} ({Path(source).absolute()}). A checkpoint of the "
            "original BLIP becomes one by `mmtune convert blip FILE --kind KIND --out FOLDER`."
        )
    model = _hf_model(source, random)
    processor = AutoImageProcessor.from_pretrained(source, use_fast=False)
    tokenizer = AutoTokenizer.from_pretrained(source)
    return hf_loaded(model, tokenizer, _spec(processor, model), f"hf:{rest}", processor)


def _hf_model(source: str, random: bool) -> nn.Module:
    """A model of the class that its config names; AutoModel would leave BLIP's heads out."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(source)
    named: Any = getattr(transformers, (config.architectures or [""])[0], None)
    if random:
        return transformers.AutoModel.from_config(config) if named is None else named(config)
    return (named or transformers.AutoModel).from_pretrained(source)


def hf_loaded(
    model: nn.Module, tokenizer: Any, image: ImageSpec, name: str, processor: Any = None
) -> Loaded:
    """A stock transformers model with its tokenizer, and its image processor if it needs that."""
    from mmtune.backbones import backbone_of

    backbone = backbone_of(model)
    config: Any = model.config
    # T5's positions are relative and have no end; it was trained on 512 tokens.
    length = int(getattr(config.text_config, "max_position_embeddings", 512))
    # SigLIP was trained on texts padded to full length and reads its last position: no mask there.
    padded = backbone.family == "siglip"

    def tokenize(texts: Sequence[str]) -> dict[str, Tensor]:
        out = tokenizer(
            list(texts),
            padding="max_length" if padded else True,
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        keys = ("input_ids",) if padded else ("input_ids", "attention_mask")
        return {k: out[k] for k in keys}

    def count(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    if not getattr(backbone, "reads_sizes", False):
        processor = None
    return Loaded(
        model.eval(), backbone, image, tokenize, length, name, count, tokenizer, processor
    )


_PIL_NAMES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def _spec(processor: Any, model: nn.Module) -> ImageSpec:
    from mmtune.backbones import backbone_of

    size = processor.size
    # Where a processor's edges are numbers of pixels in all, the family has a square of its own.
    own = getattr(backbone_of(model), "square", None)
    short = None if own else size.get("shortest_edge")
    mean, std = processor.image_mean, processor.image_std
    return ImageSpec(
        size=int(own or short or size["height"]),
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        interpolation=_PIL_NAMES.get(int(processor.resample), "bicubic"),
        resize="shortest" if short else "squash",
    )
