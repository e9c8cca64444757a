"""IKE's demonstrations: which are shown, in which order, and the prompt that they make.

Source: Zheng et al., Can We Edit Factual Knowledge by In-Context Learning?, arXiv 2305.12740, and
MMEdit, arXiv 2310.08475, for multimodal models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from editing.requests import EditRecord, EditRequest

Order = Literal["best-last", "reference"]


def demonstration(fact: EditRequest, query: str, answer: str) -> str:
    """A fact, a question asked after it, and its answer."""
    return f"{context([], fact)}{query} {answer}\n\n"


def copy_demonstration(fact: EditRequest) -> str:
    """The fact's own question as the query: what the fact says is what is answered."""
    return demonstration(fact, fact.question, fact.target)


def demonstrations(records: Sequence[EditRecord]) -> list[str]:
    """The pool that training records give, in their order.

    A record shows three things, of which it leaves out what it lacks: copy (its own question),
    update (another wording, the target is the answer) and retain (a question that the edit does not
    touch, with its own answer).
    """
    found = []
    for record in records:
        found.append(copy_demonstration(record.request))
        for probe in record.text_generality[:1]:
            found.append(demonstration(record.request, probe.question, record.request.target))
        for probe in record.text_locality[:1]:
            found.append(demonstration(record.request, probe.question, probe.answer))
    return found


@dataclass(frozen=True)
class Retrieved:
    """The demonstrations nearest to a new fact.

    Attributes:
        order: numbers in the pool, nearest first; of equals the earlier one.
        scores: [n] cosine with each demonstration of the pool.
    """

    order: list[int]
    scores: Tensor


def retrieve(query: Tensor, pool: Tensor, k: int) -> Retrieved:
    """The k demonstrations whose embeddings have the largest cosine with the query's.

    Args:
        query: [d] embedding of the new fact's `copy_demonstration`.
        pool: [n, d] embeddings of the demonstrations.
        k: at most n are found; 0 finds none.

    Raises:
        ValueError: a negative k.
    """
    import torch.nn.functional as F

    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")
    scores = F.normalize(pool, dim=-1) @ F.normalize(query, dim=-1)
    order = scores.argsort(descending=True, stable=True)[:k]
    return Retrieved(order.tolist(), scores)


def shown(
    pool: Sequence[str], nearest_first: Sequence[int], fact: EditRequest, order: Order = "best-last"
) -> list[str]:
    """The demonstrations of a prompt, in its order; the last is the new fact's own.

    Args:
        pool: of `demonstrations`.
        nearest_first: numbers in it, as `retrieve` orders them.
        fact: the new edit.
        order: "best-last" puts the nearest beside the question; "reference" farthest from it, as
            MMEdit's released code does.
    """
    numbers = nearest_first if order == "reference" else list(reversed(nearest_first))
    return [*(pool[i] for i in numbers), copy_demonstration(fact)]


def context(examples: Sequence[str], fact: EditRequest) -> str:
    """What stands in front of any question while the edit holds, locality questions included.

    The question follows at once; its answer follows with one blank (`after_prompt` of
    `mmtune.backbones.generation` knows which tokenizers want it).
    """
    return f"{''.join(examples)}New Fact: {fact.question} {fact.target}\nPrompt: "
