"""The reference's layers, rebuilt on Linears with sites, so that the shipped tuner adapts them."""

import torch
import torch.nn.functional as F
from torch import nn

from mmtune.backbones import register
from mmtune.backbones.base import Backbone, Site

from .draws import D, Draws

HEADS = 12


def linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0])
    module.weight.data, module.bias.data = weight.clone(), bias.clone()
    return module


def norm(draws: Draws, name: str, eps: float) -> nn.LayerNorm:
    module = nn.LayerNorm(D, eps=eps)
    module.weight.data, module.bias.data = draws[f"{name}_g"].clone(), draws[f"{name}_b"].clone()
    return module


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None):
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * 64**-0.5
    if mask is not None:
        scores = scores + mask[:, None, None, :]
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class VitAttention(nn.Module):
    def __init__(self, draws: Draws, prefix: str = "") -> None:
        super().__init__()
        weights = draws[f"{prefix}qkv_w"].chunk(3)
        biases = draws[f"{prefix}qkv_b"].chunk(3)
        self.q, self.k, self.v = (linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out = linear(draws[f"{prefix}proj_w"], draws[f"{prefix}proj_b"])

    def forward(self, x):
        return self.out(attend(self.q(x), self.k(x), self.v(x), None))


class VitMlp(nn.Module):
    def __init__(self, draws: Draws, prefix: str = "") -> None:
        super().__init__()
        self.fc1 = linear(draws[f"{prefix}fc1_w"], draws[f"{prefix}fc1_b"])
        self.fc2 = linear(draws[f"{prefix}fc2_w"], draws[f"{prefix}fc2_b"])

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class TextAttention(nn.Module):
    def __init__(self, draws: Draws, prefix: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (
            linear(draws[f"{prefix}{c}_w"], draws[f"{prefix}{c}_b"]) for c in "qkvo"
        )
        self.ln = norm(draws, f"{prefix}ln", 1e-12)

    def forward(self, x, source, mask):
        return self.ln(self.o(attend(self.q(x), self.k(source), self.v(source), mask)) + x)


class TextLayer(nn.Module):
    def __init__(self, draws: Draws, prefix: str = "", cross: bool = False) -> None:
        super().__init__()
        self.attention = TextAttention(draws, f"{prefix}self.")
        self.cross = TextAttention(draws, f"{prefix}cross.") if cross else None
        self.ffn1 = linear(draws[f"{prefix}ffn1_w"], draws[f"{prefix}ffn1_b"])
        self.ffn2 = linear(draws[f"{prefix}ffn2_w"], draws[f"{prefix}ffn2_b"])
        self.ln = norm(draws, f"{prefix}ffn_ln", 1e-12)
        for name in ("scale_self", "shift_self", "scale_cross", "shift_cross"):
            setattr(self, name, nn.Parameter(draws[f"{prefix}{name}"].clone()))

    def forward(self, x, mask, enc=None, enc_mask=None):
        s = self.attention(x, x, mask)
        y = s if enc is None else self.cross(s, enc, enc_mask)
        z = self.ln(self.ffn2(F.gelu(self.ffn1(y))) + y)
        if enc is None:
            return z
        gated = s * self.scale_self + self.shift_self + y * self.scale_cross + self.shift_cross
        return z + 0.1 * gated


class VitBlock(nn.Module):
    def __init__(self, draws: Draws, prefix: str) -> None:
        super().__init__()
        self.ln1 = norm(draws, f"{prefix}ln1", 1e-6)
        self.attention = VitAttention(draws, prefix)
        self.ln2 = norm(draws, f"{prefix}ln2", 1e-6)
        self.mlp = VitMlp(draws, prefix)

    def forward(self, x):
        x = x + self.attention(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class TwoTowers(nn.Module):
    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, D, 16, 16)
        self.patch.weight.data = draws["vis.patch_w"].clone()
        self.patch.bias.data = draws["vis.patch_b"].clone()
        self.cls, self.pos = (nn.Parameter(draws[f"vis.{n}"].clone()) for n in ("cls", "pos"))
        self.blocks = nn.ModuleList(VitBlock(draws, f"vis.{i}.") for i in range(2))
        self.vision_ln = norm(draws, "vis.ln", 1e-6)
        self.word, self.text_pos = (
            nn.Parameter(draws[f"txt.{n}"].clone()) for n in ("word", "pos")
        )
        self.embed_ln = norm(draws, "txt.emb_ln", 1e-12)
        self.layers = nn.ModuleList(TextLayer(draws, f"txt.{i}.", cross=True) for i in range(2))

    def image(self, pixels):
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.vision_ln(x)

    def text(self, ids, mask, enc=None):
        x = self.embed_ln(self.word[ids] + self.text_pos[: ids.shape[1]])
        for layer in self.layers:
            x = layer(x, mask, enc)
        return x


@register
class GoldenBackbone(Backbone):
    """Sites of the modules above, wherever they stand."""

    family = "golden"
    summary = "the reference's layers"

    @classmethod
    def matches(cls, model):
        return isinstance(model, VitAttention | VitMlp | TextLayer | TwoTowers)

    def iter_sites(self):
        def under(branch, layer, path, names):
            module = self.model.get_submodule(path)
            for role, name in names.items():
                full = f"{path}.{name}" if path else name
                yield Site(branch, layer, role, full, module.get_submodule(name), D)

        attention = {"q": "q", "k": "k", "v": "v", "out": "out"}
        mlp = {"fc1": "fc1", "fc2": "fc2"}
        text = {"q": "q", "k": "k", "v": "v", "out": "o"}
        cross = {f"cross_{role}": name for role, name in text.items()}
        for path, module in self.model.named_modules():
            numbers = [int(part) for part in path.split(".") if part.isdigit()]
            layer = numbers[0] if numbers else 0
            if isinstance(module, VitAttention):
                yield from under("vision", layer, path, attention)
            elif isinstance(module, VitMlp):
                yield from under("vision", layer, path, mlp)
            elif isinstance(module, TextAttention):
                is_cross = path.endswith("cross")
                yield from under(
                    "fusion" if is_cross else "text", layer, path, cross if is_cross else text
                )

    def set_gradient_checkpointing(self, enable=True):
        return False

    def embed_pairs(self, model, batch):
        raise NotImplementedError

    def encode_image(self, model, pixel_values):
        raise NotImplementedError

    def encode_text(self, model, input_ids, attention_mask=None):
        raise NotImplementedError
