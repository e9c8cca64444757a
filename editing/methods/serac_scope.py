"""SERAC's scope and mixture: is a question about a cached edit, and whose answer counts then.

Source: Mitchell et al., Memory-Based Model Editing at Scale, arXiv 2206.06520, section 3; the
mixture of MMEdit's released code is `mixture(..., eps=REFERENCE_EPS)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Distance = Literal["square", "euclidean", "cosine"]
REFERENCE_EPS = 2.0**-23
HARD = 0.5  # similarity above which a hard switch takes the counterfactual model


class Scope(NamedTuple):
    """The cached edit that fits each question best.

    Attributes:
        log_similarity: [b], at most 0.
        index: [b] number of the edit.
    """

    log_similarity: Tensor
    index: Tensor


def log_similarities(
    questions: Tensor,
    cache: Tensor,
    distance: Distance = "square",
    heads: int = 1,
    tanh: bool = False,
    scale: Tensor | float = 1.0,
) -> Tensor:
    """[b, n] log of the similarity of questions and cached edits: -scale * distance.

    With the defaults the similarity is exp(-|q - c|^2).

    Args:
        questions: [b, d] embeddings.
        cache: [n, d] embeddings.
        distance: "square" |q - c|^2, "euclidean" |q - c|, "cosine" 1 - cos(q, c).
        heads: equal parts of an embedding; the part with the smallest distance counts.
        tanh: squash embeddings first.
        scale: may be learned.

    Raises:
        ValueError: d is no multiple of `heads`, or nothing is cached.
    """
    import torch
    import torch.nn.functional as F

    width = questions.shape[-1]
    if width % heads or cache.shape[-1] != width or not len(cache):
        raise ValueError(
            f"expected embeddings [b, d] and at least one cached edit [n, d], d a multiple of "
            f"{heads} heads, got {[*questions.shape]} and {[*cache.shape]}"
        )
    q, c = (x.unflatten(-1, (heads, width // heads)) for x in (questions, cache))
    if tanh:
        q, c = q.tanh(), c.tanh()
    q, c = q[:, None], c[None]
    if distance == "cosine":
        # Rounding may take a cosine above 1; a similarity above 1 would be no weight.
        apart = (1 - F.cosine_similarity(q, c, dim=-1)).clamp(min=0)
    elif distance == "square":
        apart = (q - c).square().sum(-1)
    else:
        apart = torch.linalg.vector_norm(q - c, dim=-1)
    return -scale * apart.amin(-1)


def best(log_similarity: Tensor) -> Scope:
    """The most similar of n edits for each of b questions, from [b, n]."""
    found = log_similarity.max(dim=-1)
    return Scope(found.values, found.indices)


def mixture(
    base: Tensor, counterfactual: Tensor, log_similarity: Tensor, eps: float = 0.0
) -> Tensor:
    """[b, t, v] log((1 - s) softmax(base) + s softmax(counterfactual)), s the similarity.

    In float32 at least; differentiable, with finite gradients also where s is 0 or 1.

    Args:
        base: [b, t, v] logits of the unedited model.
        counterfactual: [b, t', v] of the model that reads the edit first; t' >= t, and its last t
            positions count.
        log_similarity: [b], at most 0.
        eps: added to the probabilities; `REFERENCE_EPS` is the released code's, whose result is no
            distribution any more.
    """
    import torch

    exact = torch.promote_types(base.dtype, torch.float32)
    p, q = (x.to(exact).log_softmax(-1) for x in (base, aligned(base, counterfactual)))
    share = log_similarity.to(exact)[:, None, None]
    certain = share >= 0
    # log(1 - s) has no gradient at s = 1, where the base model does not count anyway.
    rest = torch.log(-torch.expm1(torch.where(certain, -1.0, share)))
    mixed = torch.where(certain, q, torch.logaddexp(p + rest, q + share))
    return mixed if not eps else (mixed.exp() + eps).log()


def switched(
    base: Tensor, counterfactual: Tensor, log_similarity: Tensor, above: float = HARD
) -> Tensor:
    """[b, t, v] logits of the counterfactual model where the similarity is above, else of the base.

    Args:
        base: [b, t, v].
        counterfactual: [b, t', v], as in `mixture`.
        log_similarity: [b].
        above: similarity in [0, 1].
    """
    import torch

    inside = (log_similarity.exp() > above)[:, None, None]
    return torch.where(inside, aligned(base, counterfactual), base)


def aligned(base: Tensor, counterfactual: Tensor) -> Tensor:
    """[b, t, v]: the last t positions of [b, t', v].

    Raises:
        ValueError: there are fewer.
    """
    length = base.shape[1]
    if counterfactual.shape[1] < length:
        raise ValueError(
            f"the counterfactual model read the edit too, so it has at least the base model's "
            f"{length} positions; got {counterfactual.shape[1]}"
        )
    return counterfactual[:, counterfactual.shape[1] - length :]


def edit_text(question: str, target: str) -> str:
    """A cached edit as the scope classifier reads it."""
    return f"{question} {target}"


def question_text(
    question: str, answer: str, scope: Literal["question", "reference"] = "question"
) -> str:
    """What the scope classifier reads of a question that is asked.

    Args:
        question: the text.
        answer: the right answer, which nobody knows when a question is asked.
        scope: "question" reads the question alone; "reference" the answer too, as the released
            code does, by which it sees what it is to predict.
    """
    return question if scope == "question" else edit_text(question, answer)


def counterfactual_context(question: str, target: str) -> str:
    """What stands in front of a question where the counterfactual model answers it."""
    return f"{edit_text(question, target)} "
