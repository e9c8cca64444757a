"""Prompts as few rows: what several begin with, an image above all, is read once.

A row holds groups side by side, and a group the beginning that its prompts share with what each
goes on with. Each token sees its own prompt alone, from its first token on (the attention mask is
a tree), and has the position that it has there. So the scores are those of prompts in rows of their
own, but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from mmtune.backbones.generation import Decoding

MULTIPLE = 8  # of which a row's length is one: kernels for masked attention want that


@dataclass(frozen=True)
class Prompt:
    """A prompt, and how much is read behind it.

    Attributes:
        ids: of its tokens, without padding.
        first: number of its first token's embedding among those of all contexts.
        image: which image it is about; None for none.
        opening: tokens up to the image's last, which must be shared if any is.
        behind: (number of the first embedding, count) of what follows it.
    """

    ids: Sequence[int]
    first: int
    image: int | None = None
    opening: int = 0
    behind: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.ids) + self.behind[1]


@dataclass(frozen=True)
class Packing:
    """Where n prompts stand in u rows of s tokens.

    Attributes:
        source: [u, s] number of each token's embedding.
        positions: [u, s] of each token in its prompt.
        seen: [u, 1, s, s] bool, whether a token (third) sees another (fourth).
        predicts: [n, t] number, among the u * s, of the token behind which each target token comes.
        row, slot: [n] the row that a prompt stands in, and its number there.
        own: [n, s] bool, which tokens of its row are the prompt's, without what is behind it.
        lengths: [n] tokens of each prompt.
    """

    source: Tensor
    positions: Tensor
    seen: Tensor
    predicts: Tensor
    row: Tensor
    slot: Tensor
    own: Tensor
    lengths: Tensor


def shared_lengths(prompts: Sequence[Prompt]) -> dict[int, int]:
    """Image -> how many tokens all prompts about it begin with, where these include the image.

    Each prompt keeps a token of its own.
    """
    by_image: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        if prompt.image is not None:
            by_image.setdefault(prompt.image, []).append(prompt)
    found = {}
    for image, group in by_image.items():
        most = min(len(prompt.ids) for prompt in group) - 1
        columns = zip(*(prompt.ids[:most] for prompt in group), strict=True)
        same = next((i for i, column in enumerate(columns) if len(set(column)) > 1), most)
        if len(group) > 1 and same >= max(prompt.opening for prompt in group):
            found[image] = same
    return found


@dataclass(frozen=True)
class Plan:
    """Which prompts stand together.

    Attributes:
        shared: image -> tokens that all prompts about it begin with.
        groups: numbers of prompts that begin together, and of each other prompt by itself.
        rows: numbers of the groups in each row.
        length: tokens of a row, padding included.
        cost: of a pass, see `cost_of`.
    """

    shared: Mapping[int, int]
    groups: Sequence[Sequence[int]]
    rows: Sequence[Sequence[int]]
    length: int
    cost: float


def cost_of(rows: int, length: int, width: int) -> float:
    """What a pass over rows of so many tokens takes, in tokens that need not attend to anything.

    Beside a layer's matrices, 12 d^2 multiplications a token, attention takes 2 s d, somewhat more
    under a mask.

    Args:
        rows, length: of the pass.
        width: d, of the language model.
    """
    return rows * length * (1 + length / (4 * width))


def planned(prompts: Sequence[Prompt], width: int) -> Plan:
    """The rows that cost least: few and long, or many and short.

    Args:
        prompts: to be packed.
        width: see `cost_of`.
    """
    shared = shared_lengths(prompts)
    groups = _groups(prompts, shared)
    sizes = [_size(prompts, group, shared) for group in groups]
    found = []
    for count in range(1, len(groups) + 1):
        length = max(max(sizes), -(-sum(sizes) // count))
        length = -(-length // MULTIPLE) * MULTIPLE
        rows = _rows(sizes, length)
        found.append(Plan(shared, groups, rows, length, cost_of(len(rows), length, width)))
    return min(found, key=lambda plan: plan.cost)


def packing(prompts: Sequence[Prompt], plan: Plan, targets: int, device: Any) -> Packing:
    """Prompts in rows.

    Args:
        prompts: n.
        plan: which stand together.
        targets: t, at most that many tokens are predicted behind a prompt.
        device: of the tensors.
    """
    import torch

    shared, groups, rows, length = plan.shared, plan.groups, plan.rows, plan.length
    source = torch.zeros(len(rows), length, dtype=torch.int64)
    positions = torch.zeros_like(source)
    segment = torch.full_like(source, -1)  # of padding, which sees itself
    parent = torch.full_like(source, -1)
    predicts = torch.zeros(len(prompts), targets, dtype=torch.int64)
    places = torch.zeros(3, len(prompts), dtype=torch.int64)  # row, slot, segment
    parents = torch.zeros(len(prompts), dtype=torch.int64)
    count = 0
    for r, members in enumerate(rows):
        at, slot = 0, 0
        for g in members:
            begun = count
            for n, (number, begin, numbers) in enumerate(_pieces(prompts, groups[g], shared)):
                here = slice(at, at + len(numbers))
                source[r, here] = torch.tensor(numbers)
                positions[r, here] = torch.arange(begin, begin + len(numbers))
                segment[r, here], parent[r, here] = count, begun if n else count
                if number is not None:
                    prompt = prompts[number]
                    last = at + len(prompt.ids) - begin - 1
                    behind = torch.arange(targets).clamp(max=prompt.behind[1])
                    predicts[number] = r * length + last + behind
                    places[:, number] = torch.tensor([r, slot, count])
                    parents[number] = parent[r, at]
                    slot += 1
                at += len(numbers)
                count += 1
    seen = (segment[:, None] == segment[:, :, None]) | (segment[:, None] == parent[:, :, None])
    seen &= torch.ones(length, length, dtype=torch.bool).tril()
    of_row, lengths = segment[places[0]], torch.tensor([len(p.ids) for p in prompts])
    own = (of_row == places[2][:, None]) | (of_row == parents[:, None])
    own &= positions[places[0]] < lengths[:, None]
    tensors = (source, positions, seen[:, None], predicts, places[0], places[1], own, lengths)
    return Packing(*(tensor.to(device) for tensor in tensors))


def embedded(
    packing: Packing, contexts: Sequence[Mapping[str, Tensor]], words: Tensor | None = None
) -> dict[str, Tensor]:
    """The input of a language model.

    Args:
        packing: where tokens stand.
        contexts: {embeds [k, p, d]} each, padding included.
        words: [n, t, d] what is read behind the prompts.
    """
    import torch

    flat = [context["embeds"].flatten(0, 1) for context in contexts]
    if words is not None:
        flat.append(words.to(flat[0]).flatten(0, 1))
    return {
        "inputs_embeds": torch.cat(flat)[packing.source],
        "attention_mask": packing.seen,
        "position_ids": packing.positions,
    }


def scored(
    model: Any,
    packing: Packing,
    contexts: Sequence[Mapping[str, Tensor]],
    target_ids: Tensor | None = None,
    cache: Any = None,
) -> Tensor:
    """[n, t, v]: the scores from which each target token is predicted.

    Args:
        model: whose `model.language_model` and `lm_head` compute.
        packing: of the prompts, with all but the last token of each target behind.
        contexts: see `embedded`.
        target_ids: [n, t]; None where nothing is behind the prompts.
        cache: to keep keys and values in.
    """
    language = model.model.language_model
    words = None if target_ids is None else model.get_input_embeddings()(target_ids[:, :-1])
    kept = {"use_cache": False} if cache is None else _keeping(language, cache)
    states = language(**embedded(packing, contexts, words), **kept).last_hidden_state
    return model.lm_head(states.flatten(0, 1)[packing.predicts])


def written(
    model: Any,
    packing: Packing,
    cache: Any,
    scores: Tensor,
    decoding: Decoding,
    ends: Sequence[int],
    pad: int,
    known: Tensor | None = None,
) -> Tensor:
    """[n, m] new tokens, written greedily behind the prompts, all of them a step.

    Args:
        model: see `scored`.
        packing, cache: of a pass of `scored`.
        scores: [n, v] of each first new token.
        decoding: with one beam and a cache, which ends when it likes.
        ends: ids that end a text.
        pad: what follows an end.
        known: [n] bool, of which prompts the answer is not wanted; their rows are padding.
    """
    import torch

    language, embed = model.model.language_model, model.get_input_embeddings()
    rows, slots = len(packing.source), int(packing.slot.max()) + 1
    place = packing.row * slots + packing.slot
    seen = packing.own.new_zeros(rows * slots, packing.own.shape[1])
    seen[place] = packing.own
    seen = seen.view(rows, slots, -1)
    itself = torch.eye(slots, dtype=torch.bool, device=seen.device).expand(rows, -1, -1)
    finish = torch.tensor(list(ends), device=seen.device)
    ended = torch.zeros_like(packing.row, dtype=torch.bool) if known is None else known
    ids = packing.row.new_full((rows * slots,), pad)
    positions = torch.zeros_like(ids)
    found = []
    for step in range(decoding.max_tokens):
        if step:
            ids[place], positions[place] = found[-1], packing.lengths + step - 1
            seen = torch.cat([seen, itself], dim=-1)
            states = language(
                inputs_embeds=embed(ids.view(rows, slots)),
                attention_mask=seen[:, None],
                position_ids=positions.view(rows, slots),
                **_keeping(language, cache),
            ).last_hidden_state
            scores = model.lm_head(states.flatten(0, 1)[place])
        chosen = scores.argmax(-1)
        found.append(torch.where(ended, pad, chosen))
        ended = ended | torch.isin(chosen, finish)
        if bool(ended.all()):
            break
    return torch.stack(found, dim=1)


def _keeping(language: Any, cache: Any) -> dict[str, Any]:
    """Arguments by which a language model keeps keys and values; versions name them otherwise."""
    import inspect

    known = inspect.signature(type(language).forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache, "use_cache": True}


def _groups(prompts: Sequence[Prompt], shared: Mapping[int, int]) -> list[list[int]]:
    """Numbers of prompts that begin together, and of each other prompt by itself."""
    found: dict[Any, list[int]] = {}
    for number, prompt in enumerate(prompts):
        together = prompt.image is not None and prompt.image in shared
        found.setdefault(prompt.image if together else (number,), []).append(number)
    return list(found.values())


def _size(prompts: Sequence[Prompt], group: Sequence[int], shared: Mapping[int, int]) -> int:
    return sum(len(numbers) for _, _, numbers in _pieces(prompts, group, shared))


def _pieces(
    prompts: Sequence[Prompt], group: Sequence[int], shared: Mapping[int, int]
) -> Iterator[tuple[int | None, int, list[int]]]:
    """(prompt, position of its first token, numbers of embeddings); first what all begin with."""
    first = prompts[group[0]]
    begin = 0 if first.image is None else shared.get(first.image, 0)
    if begin:
        yield None, 0, list(range(first.first, first.first + begin))
    for number in group:
        prompt = prompts[number]
        own = range(prompt.first + begin, prompt.first + len(prompt.ids))
        start, count = prompt.behind
        yield number, begin, [*own, *range(start, start + count)]


def _rows(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Numbers of the groups in each row: the longest first, each where there is room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for g in sorted(range(len(sizes)), key=lambda g: -sizes[g]):
        r = next((r for r, left in enumerate(room) if left >= sizes[g]), None)
        if r is None:
            r = len(rows)
            rows.append([])
            room.append(length)
        rows[r].append(g)
        room[r] -= sizes[g]
    return rows
