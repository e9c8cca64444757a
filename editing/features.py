"""Frozen features of what is asked, by which memories route: of its words, and of its image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from editing.mllm import MLLM
    from editing.requests import EditRequest, Probe


@dataclass(frozen=True)
class Features:
    """Features of n probes, in float32, on the model's device.

    Attributes:
        words: [n, d] mean over the question's tokens of the language model's states halfway up,
            each of mean 0 and variance 1.
        image: [n, d] the same of the image's tokens as the language model is given them; zero where
            there is no image.
        seen: [n] bool, whether there is one.
    """

    words: Tensor
    image: Tensor
    seen: Tensor


@torch.no_grad()
def features_of(mllm: MLLM, asked: Sequence[Probe | EditRequest], size: int = 16) -> Features:
    """Read each question without its image and without a template, and each image by itself.

    Trained language models have states, the first token's above all, that are hundreds of times as
    long as others: means of states as they are would be parallel for any two questions.

    No answer is read: what a memory knows of a question is what a user types and shows. Edits that
    are applied to the model's weights change these features; memories ask before they are applied.

    Args:
        mllm: the model.
        asked: probes or requests.
        size: probes computed at once.
    """
    parts = [_features(mllm, asked[i : i + size]) for i in range(0, len(asked), size)]
    columns = zip(*((f.words, f.image, f.seen) for f in parts), strict=True)
    return Features(*(torch.cat(column) for column in columns))


def _features(mllm: MLLM, asked: Sequence[Probe | EditRequest]) -> Features:
    words = _question_states(mllm, [one.question for one in asked])
    image = torch.zeros_like(words)
    rows = [i for i, one in enumerate(asked) if one.image is not None]
    if rows:
        pixels = mllm.pixels([one.image for one in asked if one.image is not None])
        tokens = mllm.backbone.image_tokens(mllm.model, **pixels)
        image[rows] = torch.stack([_normed(t).mean(0) for t in tokens])
    seen = torch.tensor([one.image is not None for one in asked], device=mllm.device)
    return Features(words, image, seen)


def _normed(states: Tensor) -> Tensor:
    return nn.functional.layer_norm(states.float(), states.shape[-1:])


def _question_states(mllm: MLLM, questions: Sequence[str]) -> Tensor:
    """[n, d]; zero for an empty question."""
    view, stock = mllm.backbone, mllm.model
    path = view.trunks()["language"].path
    layers = [s for s in view.select(["language"], ["layer"]) if s.path.startswith(path)]
    found: list[Tensor] = []

    def record(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    prompts = view.text_prompts(mllm.tokenizer, [q or "?" for q in questions])
    prompts = {name: value.to(mllm.device) for name, value in prompts.items()}
    handle = layers[(len(layers) - 1) // 2].module.register_forward_hook(record)
    try:
        context = view.read(stock, None, **prompts)
        end = prompts["input_ids"].new_full((len(questions), 1), view.ends[0])
        view.continued(stock, context, end, torch.ones_like(end))
    finally:
        handle.remove()
    mask = context["mask"][..., None].float()
    means = (_normed(found[0]) * mask).sum(1) / mask.sum(1)
    return means * torch.tensor([[float(bool(q))] for q in questions], device=means.device)
