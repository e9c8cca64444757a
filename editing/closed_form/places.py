"""Where an edit sits: the token whose key is looked up, and how modules are read and moved there.

A prompt is tokens of the image and words. Its tokens stand in one column after the other of what a
decoder-only model reads, the answer behind them; an encoder-decoder reads the prompt in its encoder
and the answer in its decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from editing.batches import Batch, Part
    from editing.mllm import MLLM
    from mmtune.backbones.base import Backbone, Site

Place = Literal["prompt", "question", "subject"]
Stack = Literal["decoder-only", "encoder", "decoder"]
# part of a batch, what goes in [k, s, d], what comes out [k, s, e] -> what is to come out, or None
See = Callable[["Part", Tensor, Tensor], Tensor | None]


def stack_of(backbone: Backbone, site: Site) -> Stack:
    """Which stack of the language model a site is in."""
    trunk = backbone.trunks()["language"]
    if trunk.causal:
        return "decoder-only"
    return "encoder" if site.path.startswith(f"{trunk.path}.") else "decoder"


def valid(batch: Batch, part: Part, stack: Stack, length: int) -> Tensor:
    """[k, length] which of the tokens that a layer reads are no padding."""
    if stack == "decoder":
        return batch.target_mask[part.rows] > 0
    # The last token is predicted and not read; in shorter rows that is an end token before padding.
    answers = batch.answer_mask[part.rows, : 0 if stack == "encoder" else -1]
    words = part.prompts["attention_mask"]
    image = length - words.shape[1] - answers.shape[1]  # tokens that come before the words
    return torch.cat([nn.functional.pad(words, (image, 0), value=1), answers], dim=1) > 0


def index_of(batch: Batch, part: Part, stack: Stack, columns: Tensor, length: int) -> Tensor:
    """[k] the places of a part's probes among the `length` tokens that a layer reads.

    Args:
        batch: what is asked.
        part: of it.
        stack: of the layer.
        columns: [n] of the places among the words of each prompt, see `columns_of`.
        length: tokens read, image and answer included.
    """
    if stack == "decoder":  # it reads no prompt: its first token predicts the answer's first
        return torch.zeros_like(part.rows)
    answers = 0 if stack == "encoder" else batch.target_mask.shape[1] - 1
    before = length - answers - part.prompts["input_ids"].shape[1]
    return columns[part.rows] + before


def columns_of(mllm: MLLM, batch: Batch, place: Place, subjects: Sequence[str]) -> Tensor:
    """[n] the place of each probe, as a column of its part's `input_ids`.

    Args:
        mllm: the model.
        batch: what is asked.
        place: the last token of the prompt, of the question in it, or of the subject in that.
        subjects: of each probe; they are read for place "subject" only.

    Raises:
        ValueError: a place that a probe does not have; a tokenizer that does not tell where its
            tokens stand.
    """
    found = batch.target_ids.new_zeros(len(batch))
    for part in batch.parts:
        ids, mask = part.prompts["input_ids"], part.prompts["attention_mask"]
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        numbers: list[int] = part.rows.tolist()
        for row, number in enumerate(numbers):
            column = int(last[row])
            if place != "prompt":
                tail = _tail(mllm, batch, number, place, subjects[number])
                if ids[row, column + 1 - len(tail) : column + 1].tolist() != tail:
                    raise ValueError(
                        f"the tokens behind the {place} of {batch.probes[number].question!r:.80} "
                        'are others when they are read in a prompt: use place = "prompt"'
                    )
                column -= len(tail) - 1
            found[number] = column
    return found


def _tail(mllm: MLLM, batch: Batch, number: int, place: Place, subject: str) -> list[int]:
    """The tokens of a prompt from its place to its end."""
    probe = batch.probes[number]
    question = probe.question.rstrip()
    within = question if place == "question" else subject.strip()
    start = question.rfind(within) if within else -1
    if start < 0:
        raise ValueError(
            f"the question {probe.question!r:.80} holds no {place}"
            + (f" {subject!r}" if place == "subject" else "")
            + ': set EditRequest.subject to words that stand in it, or use place = "prompt"'
        )
    template = mllm.templates["text" if probe.image is None else "question"]
    before, _, after = template.partition("{question}")
    end = len(before) + start + len(within)
    text = before + probe.question + after
    try:
        read = mllm.tokenizer(text, return_offsets_mapping=True)
    except NotImplementedError:
        raise ValueError(
            f"{type(mllm.tokenizer).__name__} does not tell where its tokens stand in a text: load "
            'the fast tokenizer, or use place = "prompt"'
        ) from None
    spans = read["offset_mapping"]
    at = max(i for i, (first, stop) in enumerate(spans) if first < end <= stop)
    return list(read["input_ids"][at:])


@contextmanager
def tapped(batch: Batch, modules: Mapping[str, tuple[nn.Module, See]]) -> Iterator[None]:
    """See what goes through modules while the answers of a batch are computed, once or often.

    Args:
        batch: what is asked; each of its parts goes through every module once, in order.
        modules: name -> the module, and what sees its calls.
    """
    handles = []
    try:
        for module, see in modules.values():
            hook = partial(_seen, see, batch, [0])
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _seen(see: See, batch: Batch, calls: list[int], _: nn.Module, args: Any, output: Any) -> Any:
    part = batch.parts[calls[0] % len(batch.parts)]
    calls[0] += 1
    # A layer returns its states, alone or first of several; OPT's MLP reads all rows as one.
    out = output[0] if isinstance(output, tuple) else output
    rows = len(part.rows)
    given = args[0] if args else out
    seen = see(part, *(t.reshape(rows, -1, t.shape[-1]) for t in (given, out)))
    if seen is None:
        return None
    changed = seen.reshape(out.shape)
    return (changed, *output[1:]) if isinstance(output, tuple) else changed
