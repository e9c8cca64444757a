"""The small data sets and models that ship with the project, and the recipes that made them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from mmtune.backbones.base import Loaded

_ROOT = Path(__file__).resolve().parent
DATA_ROOT = _ROOT / "data"
MODEL_ROOT = _ROOT / "models"
# The config that a model's folder holds -> the classes that the model loads as, the default first.
_FLAVOURS = {
    "open_clip_config.json": ("open_clip", "hf"),
    "config.json": ("retrieval", "vqa", "caption"),
    "llava.json": ("package", "hub"),
}
_PIPELINE = "diffusion.json"  # the config that the folder of a text-to-image model holds


class ZooError(LookupError):
    """A name, split or flavour that the zoo does not have; the message lists those it has."""


def names() -> dict[str, list[str]]:
    """What there is: {"models": [...], "pipelines": [...], "<data set>": [its splits]}.

    Models are what `load` loads, pipelines what `pipeline` does; data sets in order of name.
    """
    found: dict[str, list[str]] = {"models": _models(), "pipelines": _pipelines()}
    for name in _data_sets():
        found[name] = _splits(name)
    return found


def data_path(name: str, split: str) -> Path:
    """The parquet file of one split, such as `data_path("clipart-animals", "train")`.

    Raises:
        ZooError: no such data set or split; the message lists those there are.
    """
    if name not in _data_sets():
        raise ZooError(
            f"the zoo has no data set {name!r}; it has {', '.join(_data_sets()) or 'none'}"
        )
    if split not in _splits(name):
        raise ZooError(f"{name} has no split {split!r}; it has {', '.join(_splits(name))}")
    return DATA_ROOT / f"{name}-{split}.parquet"


def model_path(name: str) -> Path:
    """The folder of a shipped model, in stock layout.

    Raises:
        ZooError: no such model; the message lists those there are.
    """
    known = _models() + _pipelines()
    if name not in known:
        raise ZooError(f"the zoo has no model {name!r}; it has {', '.join(known) or 'none'}")
    return MODEL_ROOT / name


def editor_path(name: str) -> Path:
    """The folder of a trained editor that ships with a model, such as "tiny-llava/mend".

    Raises:
        ZooError: no such model or editor; the message lists those there are.
    """
    model, _, editor = name.partition("/")
    known = trained_editors(model)
    if name not in known:
        have = ", ".join(known) or "none"
        raise ZooError(f"the zoo has no trained editor {name!r}; it has {have}")
    return model_path(model) / "editors" / editor


def summary(name: str) -> str:
    """What a shipped model is, in the words with which its card begins.

    Raises:
        ZooError: no such model; the message lists those there are.
    """
    card = (model_path(name) / "README.md").read_text(encoding="utf-8")
    text = " ".join(card.split("\n\n")[1].split())
    return re.split(r"[:,]", text)[0]


def trained_editors(name: str) -> list[str]:
    """The editors that ship trained for a model, such as "tiny-llava/mend".

    Raises:
        ZooError: no such model; the message lists those there are.
    """
    folder = model_path(name) / "editors"
    return sorted(f"{name}/{path.parent.name}" for path in folder.glob("*/editor.json"))


def flavours(name: str) -> tuple[str, ...]:
    """The stock classes that a shipped model loads as, the default first.

    tiny-clip: "open_clip" for open_clip's CLIP, "hf" for transformers' CLIPModel. tiny-blip:
    "retrieval", "vqa" and "caption" for transformers' BlipForImageTextRetrieval,
    BlipForQuestionAnswering and BlipForConditionalGeneration. tiny-llava, always transformers'
    LlavaForConditionalGeneration: "package" and "hub" say where its language model comes from.

    Raises:
        ZooError: no such model; the message lists those there are. It is a pipeline.
    """
    folder = model_path(name)
    for file, found in _FLAVOURS.items():
        if (folder / file).is_file():
            return found
    raise ZooError(
        f"{name} draws pictures: mmtune.zoo.pipeline({name!r}) loads it. Models that are loaded as "
        f"such: {', '.join(_models())}"
    )


def load(name: str = "tiny-clip", flavour: str | None = None) -> Loaded:
    """Load a shipped model in float32, in eval mode, on the CPU.

    Args:
        name: a model of `names()["models"]`.
        flavour: one of `flavours(name)`; None means the first.

    Raises:
        ZooError: no such model or flavour; the message lists those there are.
        LanguageMissing: tiny-llava's language model is not installed.
    """
    folder, known = model_path(name), flavours(name)
    flavour = flavour or known[0]
    if flavour not in known:
        raise ZooError(f"{name} has no flavour {flavour!r}; it has {', '.join(known)}")
    if (folder / "config.json").is_file():
        from mmtune.zoo.blip import load_blip

        return load_blip(folder, name, flavour)
    if (folder / "llava.json").is_file():
        from mmtune.zoo.llava import load_llava

        return load_llava(folder, name, flavour)
    from mmtune.zoo.loading import load_clip

    return load_clip(folder, name, flavour)


def pipeline(name: str = "tiny-diffusion") -> StableDiffusionPipeline:
    """Load a shipped text-to-image model in float32, in eval mode, on the CPU.

    Args:
        name: one of `names()["pipelines"]`.

    Raises:
        ZooError: no such pipeline; the message lists those there are.
    """
    if name not in _pipelines():
        have = ", ".join(_pipelines()) or "none"
        raise ZooError(f"the zoo has no text-to-image model {name!r}; it has {have}")
    from mmtune.zoo.diffusion import load_pipeline

    return load_pipeline(MODEL_ROOT / name)


def _pipelines() -> list[str]:
    return sorted(path.parent.name for path in MODEL_ROOT.glob(f"*/{_PIPELINE}"))


def _models() -> list[str]:
    return sorted({p.parent.name for file in _FLAVOURS for p in MODEL_ROOT.glob(f"*/{file}")})


_SPLITS = ("train", "val", "test", "test-text")


def _data_sets() -> list[str]:
    return sorted({_parts(path.stem)[0] for path in DATA_ROOT.glob("*.parquet")})


def _splits(name: str) -> list[str]:
    have = {split for n, split in map(_parts, _stems()) if n == name}
    return [split for split in _SPLITS if split in have]


def _stems() -> list[str]:
    return [path.stem for path in DATA_ROOT.glob("*.parquet")]


def _parts(stem: str) -> tuple[str, str]:
    """`clipart-animals-test` -> (`clipart-animals`, `test`); the longest known split wins."""
    for split in sorted(_SPLITS, key=len, reverse=True):
        if stem.endswith("-" + split):
            return stem[: -len(split) - 1], split
    return stem, ""
