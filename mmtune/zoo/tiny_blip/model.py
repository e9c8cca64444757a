"""The three models as one while they train, and the vision tower that they begin with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from mmtune.zoo.blip import tie
from mmtune.zoo.tiny_blip.tokenizer import CLS, DEC, PAD, SEP, SPECIAL

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BlipConfig

    from mmtune.zoo.tiny_blip.recipe import BlipRecipe


def blip_config(recipe: BlipRecipe) -> BlipConfig:
    """The config of the three stock classes."""
    from transformers import BlipConfig

    sep = SPECIAL.index(SEP)
    return BlipConfig(
        image_text_hidden_size=recipe.embed,
        projection_dim=recipe.embed,
        text_config={
            "vocab_size": recipe.vocab_size,
            "hidden_size": recipe.text_width,
            "intermediate_size": 4 * recipe.text_width,
            "projection_dim": recipe.embed,
            "num_hidden_layers": recipe.text_layers,
            "num_attention_heads": recipe.text_heads,
            "max_position_embeddings": recipe.context,
            "bos_token_id": SPECIAL.index(DEC),
            "eos_token_id": sep,
            "sep_token_id": sep,
            "pad_token_id": SPECIAL.index(PAD),
        },
        vision_config={
            "hidden_size": recipe.vision_width,
            "intermediate_size": 4 * recipe.vision_width,
            "projection_dim": recipe.embed,
            "num_hidden_layers": recipe.vision_layers,
            "num_attention_heads": recipe.vision_heads,
            "image_size": recipe.image_size,
            "patch_size": recipe.patch_size,
            "initializer_range": 0.02,
        },
    )


class TinyBlip(nn.Module):
    """BLIP as it is trained: one vision tower, an encoder and a decoder that share what they may.

    Args:
        config: of the stock classes.
        dropout: of the text encoder and decoder.
    """

    def __init__(self, config: BlipConfig, dropout: float = 0.0) -> None:
        from transformers import BlipForImageTextRetrieval
        from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

        super().__init__()
        self.config = config
        self.matching: Any = BlipForImageTextRetrieval(config)
        text: Any = config.text_config
        self.decoder: Any = BlipTextLMHeadModel(text)
        tie(self.matching.text_encoder, self.decoder)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        for layer in self.matching.vision_model.encoder.layers:
            layer.self_attn.dropout.p = 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by the name that the stock classes give it."""
        decoder = self.decoder.state_dict().items()
        return self.matching.state_dict() | {f"text_decoder.{n}": t for n, t in decoder}

    def see(self, pixels: Tensor) -> Tensor:
        """[b, 3, s, s] -> the vision tower's hidden states [b, p, d]."""
        return self.matching.vision_model(pixel_values=pixels).last_hidden_state

    def read(self, ids: Tensor, seen: Tensor | None = None) -> Tensor:
        """[b, t] -> the text encoder's hidden states [b, t, d], with what is `seen` or without."""
        mask = (ids != SPECIAL.index(PAD)).long()
        return self.matching.text_encoder(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen
        ).last_hidden_state

    def tell(self, ids: Tensor, states: Tensor) -> Tensor:
        """[DEC] texts [b, t] about hidden states -> logits [b, t, v] of what follows each token."""
        mask = (ids != SPECIAL.index(PAD)).long()
        return self.decoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=states).logits


def to_decoder(ids: Tensor) -> Tensor:
    """Encoder's tokens as the decoder's: [DEC] in the place of [CLS]."""
    import torch

    return torch.where(ids == SPECIAL.index(CLS), SPECIAL.index(DEC), ids)


def start_vision(model: TinyBlip, folder: Path, pictures: Tensor) -> None:
    """Fill the vision tower with that of a CLIP of the zoo.

    The towers are alike but for the LayerNorm of CLIP behind the embeddings. It is folded into
    them: its mean and its affine map exactly, its division by the deviation with the mean
    deviation over `pictures` (exactly for the class token, which sees no picture).

    Args:
        model: whose vision tower has CLIP's sizes.
        folder: of the CLIP.
        pictures: in [-1, 1].

    Shape:
        pictures [n, 3, s, s].

    Raises:
        ValueError: the two towers differ in size.
    """
    from safetensors.torch import load_file

    from mmtune.zoo.conversion import to_hf
    from mmtune.zoo.loading import CONFIG, WEIGHTS

    vision = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"]["vision_cfg"]
    wanted: Any = model.config.vision_config
    theirs = [vision[key] for key in ("image_size", "patch_size", "width", "layers", "head_width")]
    ours = [wanted.image_size, wanted.patch_size, wanted.hidden_size, wanted.num_hidden_layers]
    ours.append(wanted.hidden_size // wanted.num_attention_heads)
    if ours != theirs:
        raise ValueError(
            "the vision tower cannot begin as one of another size: image, patch, width, layers and "
            f"head are {ours}, expected {theirs} ({folder.name}). Use --start '' to draw it."
        )
    clip = to_hf({name: t.float() for name, t in load_file(folder / WEIGHTS).items()})
    device = next(model.parameters()).device
    state = {name: t.to(device) for name, t in blip_vision(clip, pictures.to(device)).items()}
    model.matching.vision_model.load_state_dict(state)


def blip_vision(clip: Mapping[str, Tensor], pictures: Tensor) -> dict[str, Tensor]:
    """A CLIPModel's state dict -> a BlipVisionModel's; see `start_vision`."""
    from torch.nn import functional as F

    tower = {
        name.removeprefix("vision_model."): tensor.to(pictures.device)
        for name, tensor in clip.items()
        if name.startswith("vision_model.")
    }
    result = _layers(tower)
    gain, shift = tower["pre_layrnorm.weight"], tower["pre_layrnorm.bias"]
    patch = tower["embeddings.patch_embedding.weight"]
    places = tower["embeddings.position_embedding.weight"]
    token = tower["embeddings.class_embedding"] + places[0]
    patch, places = patch - patch.mean(dim=0), places - places.mean(dim=1, keepdim=True)
    embedded = F.conv2d(pictures, patch, stride=patch.shape[-1]).flatten(2).transpose(1, 2)
    deviation = (embedded + places[1:]).square().mean(dim=-1).sqrt().mean()
    scale = gain / deviation
    result["embeddings.patch_embedding.weight"] = patch * scale[:, None, None, None]
    result["embeddings.patch_embedding.bias"] = shift
    places = places * scale
    result["embeddings.position_embedding"] = places[None]
    normal = F.layer_norm(token, token.shape, gain, shift, 1e-5)
    result["embeddings.class_embedding"] = (normal - places[0])[None, None]
    return result


def _layers(tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder and the last norm, by BLIP's names; q, k and v in one."""
    import torch

    result: dict[str, Tensor] = {}
    for name, tensor in tower.items():
        if name.startswith("post_layernorm."):
            result[name] = tensor
        elif ".self_attn.q_proj." in name:
            parts = [tower[name.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")]
            result[name.replace("q_proj", "qkv")] = torch.cat(parts)
        elif ".self_attn.out_proj." in name:
            result[name.replace("out_proj", "projection")] = tensor
        elif name.startswith("encoder.") and "_proj." not in name:
            result[name] = tensor
    return result
