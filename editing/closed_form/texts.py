"""What a model reads so that the keys it usually looks up are known: texts, or edit records."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from editing.batches import Batch, Part
from editing.datasets import read_records
from editing.ranges import Count
from editing.requests import EditRecord, Probe
from mmtune.backbones.generation import Decoding, padded
from mmtune.batched import batched
from mmtune.runs import sha256

if TYPE_CHECKING:
    from editing.mllm import MLLM

# A text of the model's own goes on from one of these. Source: the released code of ROME and MEMIT,
# whose contexts begin so.
STARTS = ("The", "Therefore", "Because", "I", "You")
WORDS = 128  # of a text that are read together, or a quarter of the positions that a model has


class CovarianceError(ValueError):
    """Texts or a file of a covariance that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class CovarianceOptions:
    """Settings of the second moment of keys, computed once per model and layer.

    Attributes:
        texts: a .json file of edit records (others than those that will be edited), whose questions
            are asked about their images and answered; or any other file, with a text on each line,
            read without a template. Empty for texts that the model writes itself, which show it no
            image: give records where questions about images are edited.
        images: folder of the records' images; None means the file's.
        tokens: keys counted, at most; fewer than a key has numbers leave directions unseen.
        ridge: added to the diagonal, in units of its mean: makes what was not seen invertible.
        batch_size: texts read at once.
        cache: folder where results are kept, half a gigabyte a layer for a model of 7B.
        seed: of the model's own texts.
    """

    texts: str = ""
    images: str | None = None
    tokens: Count = 100_000
    ridge: Annotated[float, Field(gt=0)] = 1e-4
    batch_size: Count = 8
    cache: str = "~/.cache/mmtune/covariances"
    seed: int = 0


@dataclass(frozen=True)
class Corpus:
    """What is read.

    Attributes:
        name: tells it from others: from its content, or from how it is made.
        batches: makes its batches, on an unedited model.
    """

    name: str
    batches: Callable[[], Iterator[Batch]]


def corpus(mllm: MLLM, options: CovarianceOptions) -> Corpus:
    """What the options name.

    Raises:
        CovarianceError: a file that is missing, or holds nothing to read.
    """
    size = options.batch_size
    if not options.texts:
        name = f"written by the model, seed {options.seed}"
        return Corpus(name, lambda: _of_texts(mllm, _own_texts(mllm, options), size))
    path = Path(options.texts)
    if not path.is_file():
        raise CovarianceError(
            f"covariance.texts names {options.texts}, and there is no such file: give edit records "
            "(.json) or texts, one on each line; or leave it empty"
        )
    if path.suffix == ".json":
        asked = partial(_questions, path, options.images)
        batches = lambda: map(mllm.batch, batched(asked(), size))  # noqa: E731
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
        texts = [piece for line in lines for piece in _pieces(line, _words(mllm))]
        if not texts:
            raise CovarianceError(f"{path} holds no texts: put one on each line")
        batches = lambda: _of_texts(mllm, texts, size)  # noqa: E731
    return Corpus(f"sha256 {sha256(path)}", batches)


def spoken(mllm: MLLM, texts: Sequence[str], ids: Tensor, mask: Tensor) -> Batch:
    """Texts read without a template or an image, and what follows them.

    Args:
        mllm: the model, without edits that put text in front of questions.
        texts: n of them.
        ids: [n, t] tokens that follow.
        mask: [n, t].
    """
    tokens = mllm.backbone.text_prompts(mllm.tokenizer, list(texts))
    tokens = {name: value.to(mllm.device) for name, value in tokens.items()}
    part = Part(torch.arange(len(texts), device=mllm.device), tokens, None)
    probes = tuple(Probe(text, "") for text in texts)
    ids, mask = ids.to(mllm.device), mask.to(mllm.device)
    return Batch(probes, ("",) * len(texts), (part,), ids, mask)


@dataclass(frozen=True, kw_only=True)
class _Drawn(Decoding):
    """Writes, with keys and values kept, the tokens that `draw` leaves: ids, scores -> scores."""

    draw: Callable[[Tensor, Tensor], Tensor]

    def arguments(self, ends: Sequence[int], pad: int) -> dict[str, Any]:
        return {**super().arguments(ends, pad), "logits_processor": [self.draw]}


@torch.no_grad()
def sampled(
    mllm: MLLM, starts: Sequence[str], tokens: int, generator: torch.Generator
) -> list[str]:
    """Each start with as many tokens as asked for, drawn from what the model expects next.

    Args:
        mllm: as for `spoken`.
        starts: beginnings of texts.
        tokens: drawn for each.
        generator: on the CPU.
    """
    view = mllm.backbone
    never = [*mllm.tokenizer.all_special_ids, *view.ends]

    def draw(_: Tensor, scores: Tensor) -> Tensor:
        exact = scores.double().cpu()
        exact[:, never] = -torch.inf
        exact[:, len(mllm.tokenizer) :] = -torch.inf  # embeddings may be more than there are words
        drawn = torch.multinomial(exact.softmax(-1), 1, generator=generator)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn.to(scores.device), 0.0)

    prompts = view.text_prompts(mllm.tokenizer, list(starts))
    prompts = {name: value.to(mllm.device) for name, value in prompts.items()}
    context = view.read(mllm.model, None, **prompts)
    ids = view.written(mllm.model, context, _Drawn(min_tokens=tokens, max_tokens=tokens, draw=draw))
    written = mllm.tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)
    return [f"{start} {text.strip()}" for start, text in zip(starts, written, strict=True)]


def _own_texts(mllm: MLLM, options: CovarianceOptions) -> Iterator[str]:
    generator = torch.Generator().manual_seed(options.seed)
    starts, length = itertools.cycle(STARTS), _words(mllm)
    # The draws must not depend on how many texts are read at once.
    while True:
        yield from sampled(mllm, [next(starts) for _ in range(10 * len(STARTS))], length, generator)


def _of_texts(mllm: MLLM, texts: Iterable[str], size: int) -> Iterator[Batch]:
    """An encoder-decoder reads the first half of each text, and the second is its answer."""
    halves = not mllm.backbone.trunks()["language"].causal
    for some in batched(texts, size):
        words = [text.split() for text in some]
        cut = [len(w) // 2 if halves and len(w) > 1 else len(w) for w in words]
        heads = [" ".join(w[:at]) for w, at in zip(words, cut, strict=True)]
        tails = [" ".join(w[at:]) for w, at in zip(words, cut, strict=True)]
        found = [
            mllm.backbone.targets(mllm.tokenizer, [tail], after=head)["target_ids"][0].tolist()
            for head, tail in zip(heads, tails, strict=True)
        ]
        yield spoken(mllm, heads, *padded(found, mllm.backbone.pad))


def _questions(path: Path, images: str | None) -> Iterator[Probe]:
    """What is asked and, where the source says so, what the model answers."""
    for found in read_records(path, images):
        if not isinstance(found, EditRecord):
            raise CovarianceError(f"{path} cannot be read for covariances: {found}")
        asked = found.request
        yield Probe(asked.question, found.prediction or asked.target, asked.image)


def _words(mllm: MLLM) -> int:
    config: Any = mllm.model.config
    room = getattr(config.text_config, "max_position_embeddings", None)
    return WORDS if room is None else max(min(WORDS, room // 4), 1)


def _pieces(line: str, length: int) -> list[str]:
    words = line.split()
    return [" ".join(words[i : i + length]) for i in range(0, len(words), length)]
