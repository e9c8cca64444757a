"""tiny-llava: what was trained, put together with another model's tower and a language model.

The folder holds a stock LlavaConfig, the projector, and of the vision tower what differs from that
of `vision_start`: its small tensors whole, and a low-rank delta of each matrix. The language model
comes from elsewhere, unchanged. What is loaded is a stock LlavaForConditionalGeneration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.backbones.base import ImageSpec, Loaded
from mmtune.runs import write_tensors, write_text

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import CLIPVisionModel, LlavaConfig

CONFIG = "llava.json"
FILES = ("vision", "projector")
IMAGE_TOKEN = 4  # <reponame>, which SmolLM2 has twice and no text holds
TURN = "<|im_start|>user\n<image>\n{}<|im_end|>\n<|im_start|>assistant\n"
SHORTLY = "{}\nAnswer the question using a single word or phrase."
_UP, _DOWN = ".up", ".down"
_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")  # by which a language model is known


def prompt_parts(question: str) -> tuple[str, str]:
    """What stands before the image and what behind it."""
    before, _, after = TURN.partition("<image>")
    return before, after.format(SHORTLY.format(question))


def start_tower(start: str, patch_size: int | None = None) -> CLIPVisionModel:
    """The vision tower of a model of the zoo, in float32, for patches of another size.

    The kernels of the patch embedding and the grid of positions are interpolated: the tower sees
    what it would see in a picture that is smaller by the same factor.

    Args:
        start: a model that is loaded as a CLIP.
        patch_size: pixels; None keeps the model's own.
    """
    import torch
    from safetensors.torch import load_file
    from torch.nn import functional as F
    from transformers import CLIPVisionModel

    from mmtune.zoo import model_path
    from mmtune.zoo.conversion import hf_config, to_hf
    from mmtune.zoo.loading import CONFIG as START_CONFIG
    from mmtune.zoo.loading import WEIGHTS

    folder = model_path(start)
    given = json.loads((folder / START_CONFIG).read_text(encoding="utf-8"))["model_cfg"]
    config: Any = hf_config(given, 0).vision_config
    stored = to_hf({name: t.float() for name, t in load_file(folder / WEIGHTS).items()})
    state = {
        name.removeprefix("vision_model."): t
        for name, t in stored.items()
        if name.startswith("vision_model.")
    }
    before, side = config.patch_size, config.image_size // config.patch_size
    if patch_size not in (None, before):
        kernel, grid = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"
        larger = F.interpolate(state[kernel], size=patch_size, mode="bilinear")
        state[kernel] = larger * (before / patch_size) ** 2
        first, rest = state[grid][:1], state[grid][1:].T.reshape(1, -1, side, side)
        new = F.interpolate(rest, size=config.image_size // patch_size, mode="area")
        state[grid] = torch.cat([first, new[0].flatten(1).T])
        config.patch_size = patch_size
    tower: Any = CLIPVisionModel(config)
    root_of(tower).load_state_dict(state)
    return tower.eval()


def root_of(tower: Any) -> Any:
    """The module that holds embeddings and layers, in any version of transformers."""
    return getattr(tower, "vision_model", tower)


def save_llava(
    config: LlavaConfig,
    start: str,
    small: Mapping[str, Tensor],
    deltas: Mapping[str, tuple[Tensor, Tensor]],
    projector: Mapping[str, Tensor],
    folder: Path,
) -> None:
    """Write what was trained, in fp16.

    Args:
        config: of the whole model.
        start: whose vision tower the deltas are added to.
        small: tensors of the tower that are stored whole, by name.
        deltas: name -> (up [o, r], down [r, i]), of its other matrices.
        projector: its tensors.
        folder: the model folder.
    """
    vision = dict(small)
    for name, (up, down) in deltas.items():
        vision |= {f"{name}{_UP}": up, f"{name}{_DOWN}": down}
    for file, tensors in zip(FILES, (vision, projector), strict=True):
        stored = {n: t.detach().half().cpu().contiguous() for n, t in tensors.items()}
        write_tensors(folder / f"{file}.safetensors", stored, {"format": "pt"})
    text: Any = config.text_config
    own = {k: v for k, v in config.to_diff_dict().items() if k != "text_config"}
    content = {
        "vision_start": start,
        "language": {key: getattr(text, key) for key in _SIZES},
        "config": own,
        "image": {"mean": [0.5] * 3, "std": [0.5] * 3, "resample": "bicubic"},
    }
    write_text(folder / CONFIG, json.dumps(content, indent=1) + "\n")


def llava_model(folder: Path, language: str) -> nn.Module:
    """The stock class, filled, in float32 and eval mode.

    Args:
        folder: as `save_llava` writes it.
        language: folder or hub name of the language model, which stays as it is.

    Raises:
        ValueError: the language model or the weights do not fit the config.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    lm: Any = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32)
    for key, wanted in content["language"].items():
        if (found := getattr(lm.config, key)) != wanted:
            raise ValueError(
                f"{language} has {key} {found}, and {folder} was trained with {wanted}: use "
                "SmolLM2-135M-Instruct"
            )
    config = LlavaConfig.from_dict(content["config"] | {"text_config": lm.config.to_dict()})
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    model.model.language_model = lm.model
    model.lm_head = lm.lm_head
    model.model.vision_tower = _tower(folder, content["vision_start"], config)
    projector = model.model.multi_modal_projector
    projector.load_state_dict(_stored(folder, "projector"), assign=True)
    model.generation_config = lm.generation_config
    return model.eval()


def load_llava(folder: Path, name: str, flavour: str) -> Loaded:
    """Load `folder` with its language model and what feeds it.

    Args:
        folder: as `save_llava` writes it.
        name: the model's name in the zoo.
        flavour: "package": the language model that a Python package holds, with which it was
            trained; "hub": the same in full precision, from the hub or its cache.

    Raises:
        LanguageMissing: the package is not installed.
    """
    from transformers import AutoTokenizer

    from mmtune.backbones.loading import hf_loaded
    from mmtune.zoo.smollm import HUB, language_folder

    language = str(language_folder()) if flavour == "package" else HUB
    image = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["image"]
    model: Any = llava_model(folder, language)
    spec = ImageSpec(
        size=model.config.vision_config.image_size,
        mean=tuple(image["mean"]),
        std=tuple(image["std"]),
        interpolation=image["resample"],
        resize="squash",
    )
    tokenizer = AutoTokenizer.from_pretrained(language)
    return hf_loaded(model, tokenizer, spec, f"zoo:{name}@{flavour}")


def _tower(folder: Path, start: str, config: LlavaConfig) -> nn.Module:
    """The start's tower with the stored tensors in place and the deltas added."""
    vision: Any = config.vision_config
    tower: Any = start_tower(start, vision.patch_size)
    state, stored = root_of(tower).state_dict(), _stored(folder, "vision")
    unknown = sorted({n.removesuffix(_UP).removesuffix(_DOWN) for n in stored} - set(state))
    if unknown:
        raise ValueError(f"{folder}: {start}'s tower has no {unknown[:4]}. Restore the folder.")
    for name, tensor in stored.items():
        if name.endswith(_UP):
            own = name.removesuffix(_UP)
            state[own] = state[own] + tensor @ stored[own + _DOWN]
        elif not name.endswith(_DOWN):
            state[name] = tensor
    root_of(tower).load_state_dict(state)
    return tower


def _stored(folder: Path, file: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {n: t.float() for n, t in load_file(folder / f"{file}.safetensors").items()}
