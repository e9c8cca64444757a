"""Published weights of MiniGPT-4, key by key into Blip2ForConditionalGeneration.

MiniGPT-4 trains one Linear; its checkpoint holds little more. The rest are the files that its
released code fetches: EVA's ViT-g, the Q-Former of BLIP-2 (with Flan-T5 XXL), and Vicuna.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.backbones.original_checkpoints import (
    VISION_NAMES,
    CheckpointError,
    Converted,
    fill,
    interpolated,
    preprocessing,
    read_checkpoint,
    required,
    side_of,
    some,
)

if TYPE_CHECKING:
    from torch import Tensor

VISION_LAYERS = 39  # of the 40 of EVA's ViT-g: BLIP-2 reads the last but one
VISION_HEAD, QFORMER_HEAD = 88, 64  # width of an attention head
VISION = "visual_encoder"
POSITIONS = f"{VISION}.pos_embed"
LAYER = "Qformer.bert.encoder.layer"
OTHER_NAMES = (
    (r"query_tokens", "query_tokens"),
    (r"ln_vision\.(.*)", r"vision_model.post_layernorm.\1"),
    (r"llama_proj\.(.*)", r"language_projection.\1"),
    (r"Qformer\.bert\.embeddings\.LayerNorm\.(.*)", r"qformer.layernorm.\1"),
    (
        r"Qformer\.bert\.encoder\.(layer\.\d+\.(?:cross)?attention)\.self\.(.*)",
        r"qformer.encoder.\1.attention.\2",
    ),
    (
        r"Qformer\.bert\.encoder\.(layer\.\d+\.(?:cross)?attention\.output\..*)",
        r"qformer.encoder.\1",
    ),
    (
        r"Qformer\.bert\.encoder\.(layer\.\d+\.(?:intermediate|output)_query\..*)",
        r"qformer.encoder.\1",
    ),
)
LEFT_OUT = {
    "what the Q-Former reads words with": re.compile(
        r"Qformer\.(cls\..*|bert\.embeddings\.(word_embeddings|position_embeddings|position_ids).*"
        r"|bert\.encoder\.layer\.\d+\.(intermediate|output)\..*)"
    ),
    "projections to other language models": re.compile(r"(t5_proj|opt_proj)\..*"),
    "EVA's own output": re.compile(rf"{VISION}\.((fc_)?norm\..*|head\..*|mask_token)"),
}


def convert(
    state: Mapping[str, Tensor],
    language: Any,
    placeholder: int,
    image_size: int | None = None,
    vision_layers: int = VISION_LAYERS,
) -> Converted:
    """Put the tensors of MiniGPT-4's files, and a Llama, into the stock class of BLIP-2.

    Args:
        state: tensors by the names of MiniGPT-4's code.
        language: a LlamaForCausalLM, which becomes part of the model.
        placeholder: id of a token that no text has, which holds the image tokens' places.
        image_size: pixels; None keeps those of the position embeddings.
        vision_layers: blocks of the ViT that are used.

    Raises:
        CheckpointError: a key that is missing, unknown or of another shape than the stock class
            has; the message names it.
    """
    import torch
    from transformers import Blip2ForConditionalGeneration

    if language.config.model_type != "llama":
        raise CheckpointError(
            f"MiniGPT-4's language model is a Llama (Vicuna), got a {language.config.model_type}"
        )
    used, left_out = _sorted_out(state, vision_layers)
    config, trained_at = _config(used, language.config, image_size)
    config.image_token_index = placeholder
    vision = config.vision_config
    used[POSITIONS] = interpolated(used[POSITIONS], vision.image_size // vision.patch_size)
    with torch.device("meta"):
        model: Any = Blip2ForConditionalGeneration(config)
    # Beside the language model, so that what fits is said of the other parts alone.
    del model.language_model
    fill(model, used, stock_name, assign=True)
    model.language_model = language
    return Converted(model.eval(), trained_at, dict(left_out))


def stock_name(name: str) -> str | None:
    """The name in transformers of a parameter of MiniGPT-4's code; None for an unknown one."""
    vision = name.removeprefix(f"{VISION}.")
    names = OTHER_NAMES if vision == name else VISION_NAMES
    for pattern, stock in names:
        if match := re.fullmatch(pattern, vision):
            found = match.expand(stock)
            return found if vision == name else f"vision_model.{found}"
    return None


def _sorted_out(
    state: Mapping[str, Tensor], vision_layers: int
) -> tuple[dict[str, Tensor], Counter[str]]:
    """(tensors in use, biases of q and v joined; number of those left out by reason)."""
    import torch

    used: dict[str, Tensor] = {}
    left_out: Counter[str] = Counter()
    for name, value in state.items():
        block = re.match(rf"{VISION}\.blocks\.(\d+)\.", name)
        reason = next((r for r, names in LEFT_OUT.items() if names.fullmatch(name)), None)
        if block and int(block[1]) >= vision_layers:
            reason = f"blocks of the ViT behind the first {vision_layers}"
        if reason is None:
            used[name] = value
        else:
            left_out[reason] += 1
    for name in [n for n in used if n.endswith(".attn.q_bias")]:
        stem = name.removesuffix("q_bias")
        q, v = used.pop(name), required(used, f"{stem}v_bias")
        del used[f"{stem}v_bias"]
        used[f"{stem}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])  # keys have none
    unknown = [name for name in used if stock_name(name) is None]
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} unknown key(s): {some(unknown)}. Expected those of MiniGPT-4's code: "
            f"{VISION}.*, ln_vision.*, query_tokens, Qformer.*, llama_proj.*"
        )
    return used, left_out


def _config(used: Mapping[str, Tensor], text: Any, image_size: int | None) -> tuple[Any, int]:
    """The stock config that the shapes mean, and the image size of the position embeddings."""
    from transformers import Blip2Config

    patches = required(used, f"{VISION}.patch_embed.proj.weight")
    width, patch = patches.shape[0], patches.shape[-1]
    side = side_of(required(used, POSITIONS), POSITIONS)
    size = image_size or side * patch
    if size % patch:
        raise CheckpointError(
            f"the image size must be a multiple of the {patch} pixels of a patch, got {size}"
        )
    queries = required(used, "query_tokens")
    crossed = sorted(_numbers(used, rf"{LAYER}\.(\d+)\.crossattention\."))
    inner = required(used, f"{LAYER}.0.intermediate_query.dense.weight").shape[0]
    layers = len(_numbers(used, rf"{LAYER}\.(\d+)\."))
    config: Any = Blip2Config(
        vision_config={
            "hidden_size": width,
            "intermediate_size": required(used, f"{VISION}.blocks.0.mlp.fc1.weight").shape[0],
            "num_hidden_layers": len(_numbers(used, rf"{VISION}\.blocks\.(\d+)\.")),
            "num_attention_heads": width // VISION_HEAD,
            "image_size": size,
            "patch_size": patch,
        },
        qformer_config={
            "hidden_size": queries.shape[-1],
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": queries.shape[-1] // QFORMER_HEAD,
            "cross_attention_frequency": crossed[1] - crossed[0] if len(crossed) > 1 else layers,
        },
        text_config=text.to_dict(),
        num_query_tokens=queries.shape[1],
        architectures=["Blip2ForConditionalGeneration"],
    )
    return config, side * patch


def _numbers(used: Mapping[str, Tensor], pattern: str) -> set[int]:
    return {int(match[1]) for name in used if (match := re.match(pattern, name))}


def write(
    path: str | Path,
    vision: str | Path,
    qformer: str | Path,
    language: str,
    out: Path,
    image_size: int | None = None,
) -> Converted:
    """Convert MiniGPT-4's files into a folder that `hf:FOLDER` and transformers load.

    Args:
        path: MiniGPT-4's own checkpoint (pretrained_minigpt4.pth).
        vision: EVA's ViT-g (eva_vit_g.pth).
        qformer: BLIP-2's checkpoint with the Q-Former (blip2_pretrained_flant5xxl.pth).
        language: folder or hub name of Vicuna, with its tokenizer.
        out: the folder to write: config, weights, image preprocessing, and tokenizer.
        image_size: see `convert`.

    Raises:
        CheckpointError: see `convert`; or a file that is not there, or `out` exists.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from mmtune.runs import write_folder

    if out.exists():
        raise CheckpointError(f"{out} exists already; choose another --out or delete it.")
    missing = next((f for f in (path, vision, qformer) if not Path(f).is_file()), None)
    if missing is not None:
        raise CheckpointError(f"there is no file {missing}. Expected a checkpoint (.pth).")
    eva = read_checkpoint(vision)
    state = {n if n.startswith(f"{VISION}.") else f"{VISION}.{n}": t for n, t in eva.items()}
    state |= read_checkpoint(qformer) | read_checkpoint(path)
    tokenizer: Any = AutoTokenizer.from_pretrained(language)
    if tokenizer.unk_token_id is None:
        raise CheckpointError(f"{language!r} is no tokenizer of Llama: it has no unknown token")
    llama: Any = AutoModelForCausalLM.from_pretrained(language, dtype="auto")
    if llama.config.pad_token_id in (None, -1, tokenizer.unk_token_id):
        llama.config.pad_token_id = tokenizer.eos_token_id
    converted = convert(state, llama, tokenizer.unk_token_id, image_size)
    model: Any = converted.model
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends(tokenizer),
        pad_token_id=llama.config.pad_token_id,
    )

    def fill_folder(folder: Path) -> None:
        model.save_pretrained(folder)
        preprocessing(model.config.vision_config.image_size).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    write_folder(out, fill_folder)
    return converted


def ends(tokenizer: Any) -> list[int]:
    """Ids that end an answer: the beginning of "###" behind a word, "###" alone, and </s>.

    MiniGPT-4 was trained to write ### behind an answer, which Llama's tokenizer cuts in two ways.
    """
    word, behind, alone = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "a###", "###")
    )
    found = [*behind[len(word) : len(word) + 1], *alone[:1]]
    known = [i for i in found if i != tokenizer.unk_token_id]
    return list(dict.fromkeys([*known, tokenizer.eos_token_id]))
