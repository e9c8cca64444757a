"""The pictures and questions of easy-vqa, as tensors on one device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmtune.zoo.tiny_blip.model import to_decoder
from mmtune.zoo.tiny_blip.tokenizer import PAD, SPECIAL
from mmtune.zoo.tiny_clip.material import split_table, squares

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DATA = "easy-vqa"
KINDS = ("shape", "color", "has-shape", "has-color", "lacks-shape", "lacks-color")


@dataclass
class Asked:
    """Pictures with their questions, those of each picture from the shortest to the longest.

    Attributes:
        pixels: uint8 [n, 3, s, s].
        ids: int64 [n, q, t], questions; rows without a question are padding.
        answers: int64 [n, q, a], for the decoder.
        weights: [n, q], of each question, so that the answers of a kind weigh the same.
        upto: int64 [n, t + 1], how many questions have at most so many tokens.
        shortest: tokens of the shortest question; t is that of the longest.
        context: tokens that the model takes.
        captions: int64 [n, c], what there is to see, for the decoder; a lone [DEC] where unknown.
    """

    pixels: Tensor
    ids: Tensor
    answers: Tensor
    weights: Tensor
    upto: Tensor
    shortest: int
    context: int
    captions: Tensor


def read_split(split: str, limit: int = 0) -> list[dict[str, Any]]:
    """Rows of a split; `limit` takes the first ones only, 0 all."""
    return split_table(DATA, split).slice(0, limit or None).to_pylist()


def texts_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Every question, answer and caption, for the tokenizer to learn from."""
    asked = [item for row in rows for item in row["questions"]]
    captions = [caption for row in rows if (caption := caption_of(row))]
    return [i["question"] for i in asked] + [i["answer"] for i in asked] + captions


def caption_of(row: dict[str, Any]) -> str | None:
    """Such as "blue triangle"; None where the questions do not give both words away."""
    return f"{row['color']} {row['shape']}" if row["color"] and row["shape"] else None


def kinds_of(names: str) -> tuple[str, ...]:
    """`shape,has-shape` -> its kinds of questions.

    Raises:
        ValueError: an unknown kind; the message lists those there are.
    """
    found = tuple(name.strip() for name in names.split(",") if name.strip())
    if unknown := sorted(set(found) - set(KINDS)):
        raise ValueError(f"no kind of question {unknown[0]!r}; there are {', '.join(KINDS)}")
    return found


def on_device(
    rows: Sequence[dict[str, Any]],
    kinds: Collection[str],
    captions: bool,
    tokenizer: Any,
    side: int,
    device: torch.device,
) -> Asked:
    """Decode and tokenize what is shown in training.

    Args:
        rows: of a split.
        kinds: of the questions that are asked.
        captions: whether captions are told as well.
        tokenizer: of the model.
        side: of the pictures, in pixels.
        device: where training runs.
    """
    import torch

    chosen = [[item for item in row["questions"] if item["kind"] in kinds] for row in rows]
    counts = Counter((item["kind"], item["answer"]) for some in chosen for item in some)
    answers = Counter(kind for kind, _ in counts)  # how many different ones a kind has
    totals: Counter[str] = Counter()
    for (kind, _), number in counts.items():
        totals[kind] += number
    most = max([len(some) for some in chosen] + [1])
    ids, told, weights = [], [], []
    for some in chosen:
        some = sorted(
            some, key=lambda item: len(tokenizer(item["question"], truncation=True).input_ids)
        )
        blank = [None] * (most - len(some))
        ids += [item["question"] for item in some] + blank
        told += [item["answer"] for item in some] + blank
        for item in some:
            kind = item["kind"]
            weights.append(totals[kind] / answers[kind] / counts[kind, item["answer"]])
        weights += [0.0] * len(blank)
    asked = _tokens(ids, tokenizer)
    length = (asked != SPECIAL.index(PAD)).sum(dim=1)
    length = torch.where(length == 0, asked.shape[1] + 1, length).reshape(len(rows), most, 1)
    upto = (length <= torch.arange(asked.shape[1] + 1)).sum(dim=1)
    captioned = [caption_of(row) if captions else None for row in rows]
    shown = to_decoder(_tokens(captioned, tokenizer))
    shown[:, 0] = tokenizer.bos_token_id
    return Asked(
        pixels=squares((row["image"]["bytes"] for row in rows), side).to(device),
        ids=asked.reshape(len(rows), most, -1).to(device),
        answers=to_decoder(_tokens(told, tokenizer)).reshape(len(rows), most, -1).to(device),
        weights=torch.tensor(weights).reshape(len(rows), most).to(device),
        upto=upto.to(device),
        shortest=int((upto == 0).all(dim=0).sum()),
        context=tokenizer.model_max_length,
        captions=shown.to(device),
    )


def _tokens(texts: Sequence[str | None], tokenizer: Any) -> Tensor:
    """int64 [n, t], padded to the longest; None is padding alone."""
    known = [text or "" for text in texts]
    found = tokenizer(known, padding=True, truncation=True, return_tensors="pt").input_ids
    for row, text in zip(found, texts, strict=True):
        if text is None:
            row.fill_(tokenizer.pad_token_id)
    return found


def draw_questions(
    asked: Asked, count: int, each: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random pictures, and questions about each that have at most so many tokens.

    The stock decoder sees the padding of a question. So the length of a batch is drawn anew, from
    that of the shortest question to a little above the longest: questions are met with and
    without padding.

    Args:
        asked: the training questions.
        count: pictures, b.
        each: questions about each picture, k.
        generator: on the questions' device.

    Returns:
        index int64 [b] of the pictures; questions [b k, t]; answers [b k, a]; weights [b k], 0
        where a picture has no question of that length.
    """
    import torch

    device, longest = asked.ids.device, asked.ids.shape[2]
    index = torch.randint(len(asked.pixels), (count,), generator=generator, device=device)
    most = min(longest + 3, asked.context)
    drawn = torch.randint(asked.shortest, most + 1, (1,), generator=generator, device=device)
    length = int(drawn)
    have = asked.upto[index, min(length, longest)][:, None]
    chance = torch.rand(count, each, generator=generator, device=device)
    choice = (chance * have).long().clamp_max(asked.ids.shape[1] - 1)
    rows = index[:, None]
    questions = asked.ids[rows, choice].flatten(0, 1)[:, :length]
    spare = (0, length - questions.shape[1])
    questions = torch.nn.functional.pad(questions, spare, value=SPECIAL.index(PAD))
    weights = torch.where(have > 0, asked.weights[rows, choice], 0.0).flatten()
    # a picture without such a question is asked a cut one, whose answer weighs nothing
    return index, questions, asked.answers[rows, choice].flatten(0, 1), weights
