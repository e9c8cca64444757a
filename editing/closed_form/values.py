"""Requests as keys and values: what fc2 is given at their places, and what it is to put out there.

The value is found by gradient: a vector is added at the place until the model says the target, in
each of the contexts in which the request is read, and is still of the same mind about the essence
of what it is asked about.

Source: Meng et al., arXiv 2202.05262, equation 4; arXiv 2210.07229, equation 16. In the released
code the KL is taken at the subject's last token, here at the end of the prompt; there the penalty
is |v| / |h|^2, here |v|^2 / |h|^2, and the learning rate is absolute, here in units of h's root
mean square, so that settings carry over from one model to another. ROME's 0.5 is not one of them:
taken in these units it overshoots. On tiny-llava both 0.5 and 0.1 made the model write the targets
of 4 of 4 training records, and left 1 and 3 of 4 questions without an image alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from editing.batches import Interceptor
from editing.closed_form.places import Place, columns_of, index_of, stack_of, tapped
from editing.edits import intercept
from editing.ranges import NotNegative, Positive
from editing.requests import EditRequest, Probe
from mmtune.backbones.generation import log_probabilities
from mmtune.replayed import Steps

if TYPE_CHECKING:
    from editing.batches import Batch, Part
    from editing.mllm import MLLM
    from mmtune.backbones.base import Site

CONTEXT = "context"  # the field of a probe that holds the text to be put in front of it


@dataclass(frozen=True)
class ValueOptions:
    """Settings of the search for values.

    Attributes:
        steps: of Adam at most.
        lr: Adam's, in units of the root mean square of what the layer puts out at the place.
        clamp: the vector's norm at most, in units of the norm of what the layer puts out.
        decay: weight of the vector's squared norm, in the same units.
        kl: weight of the KL of what is said about the essence.
        enough: loss (nats) below which a value is good enough.
        batch_size: requests whose values are sought at once; each has a vector of its own.
    """

    steps: Annotated[int, Field(ge=1)] = 25
    lr: Positive = 0.1
    clamp: Positive = 4.0
    decay: NotNegative = 1e-3
    kl: NotNegative = 0.0625
    enough: Positive = 0.05
    batch_size: Annotated[int, Field(ge=1)] = 4


@dataclass(frozen=True)
class Contexts:
    """m requests as n rows: each as it stands, behind some texts, and its essence.

    Attributes:
        batch: the rows.
        columns: [n] of their places, see `places.columns_of`.
        owner: [n] number of the request.
        plain: [n] bool, the requests as they stand.
        essence: [n] bool, questions whose answers are to stay.
    """

    batch: Batch
    columns: Tensor
    owner: Tensor
    plain: Tensor
    essence: Tensor

    @cached_property
    def essences(self) -> Tensor:
        """Numbers of those rows."""
        return self.essence.nonzero()[:, 0]

    @cached_property
    def _asked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers of the other rows, their requests', and how many each request has."""
        rows = (~self.essence).nonzero()[:, 0]
        owners = self.owner[rows]
        return rows, owners, torch.bincount(owners)

    def mean(self, rows: Tensor) -> Tensor:
        """[m, d] mean of rows [n, d] over each request's contexts, its essence left out."""
        asked, owners, count = self._asked
        total = rows.new_zeros(len(count), rows.shape[1])
        return total.index_add_(0, owners, rows[asked]) / count.to(rows)[:, None]


class _InContext(Interceptor):
    def preface(self, probe: Probe) -> str:
        return str(probe.fields.get(CONTEXT, ""))


@contextmanager
def in_contexts(mllm: MLLM) -> Iterator[None]:
    """Inside, probes are read behind the text among their fields; `Contexts` need it."""
    undo = intercept(mllm, _InContext())
    try:
        yield
    finally:
        undo()


def contexts_of(
    mllm: MLLM,
    requests: Sequence[EditRequest],
    place: Place,
    prefixes: Sequence[str],
    names: Sequence[str],
) -> Contexts:
    """The rows of some requests.

    The essence of a request with a subject is "{subject} is a", as published. Without one it is the
    caption of its image; a request to caption an image, or one without image and subject, has none.

    Args:
        mllm: the model, inside `in_contexts`.
        requests: m of them.
        place: of the edit.
        prefixes: texts that questions are read behind as well.
        names: the parameters that will change.
    """
    rows: list[Probe] = []
    owner, kinds, subjects = [], [], []
    for number, request in enumerate(requests):
        asked, target = request.question, request.target.strip()
        found = [("plain", Probe(asked, target, request.image))]
        for prefix in prefixes if asked else ():
            fields = {CONTEXT: prefix}
            found.append(("prefixed", Probe(asked, target, request.image, fields)))
        if place == "subject":
            about = f"{request.subject.strip()} is a"
            found.append(("essence", Probe(about, target, request.image)))
        elif asked and request.image is not None and place == "prompt":
            found.append(("essence", Probe("", target, request.image)))
        rows += [probe for _, probe in found]
        kinds += [kind for kind, _ in found]
        owner += [number] * len(found)
        subjects += [request.subject] * len(found)
    batch = mllm.batch(rows)
    where = mllm.device
    return Contexts(
        mllm.cached(batch, names),
        columns_of(mllm, batch, place, subjects),
        torch.tensor(owner, device=where),
        torch.tensor([kind == "plain" for kind in kinds], device=where),
        torch.tensor([kind == "essence" for kind in kinds], device=where),
    )


@torch.no_grad()
def read_at(
    mllm: MLLM,
    asked: Contexts,
    sites: Sequence[Site],
    weights: Mapping[str, Tensor],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Path of a site -> what goes in [n, d] and comes out [n, e] at the places of n rows.

    Args:
        mllm: the model, inside `in_contexts`.
        asked: the rows.
        sites: modules; a layer's "in" means nothing.
        weights: see `MLLM.answer_logits`.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def see(path: str, at: _At, part: Part, given: Tensor, out: Tensor) -> None:
        spots = at(part, given.shape[1])
        rows = torch.arange(len(spots), device=given.device)
        if path not in found:
            found[path] = _rows(asked, given), _rows(asked, out)
        for kept, states in zip(found[path], (given, out), strict=True):
            kept[part.rows] = states[rows, spots]

    seen = {s.path: (s.module, partial(see, s.path, _at(mllm, asked, s))) for s in sites}
    with tapped(asked.batch, seen):
        mllm.answer_logits(asked.batch, weights)
    return found


@dataclass(frozen=True)
class Values:
    """What was found for m requests.

    Attributes:
        shift: [m, d] vectors to add to what comes out at the places.
        before: [m, d] what comes out there before.
        loss: of each request at its end, nats.
        steps: that each took.
    """

    shift: Tensor
    before: Tensor
    loss: list[float]
    steps: list[int]


def values_of(
    mllm: MLLM,
    asked: Contexts,
    site: Site,
    options: ValueOptions,
    weights: Mapping[str, Tensor],
) -> Values:
    """Search the vectors that, added to what `site` puts out, make the model say the targets.

    Args:
        mllm: the model, inside `in_contexts`.
        asked: the requests' rows.
        site: fc2, or a whole layer.
        options: of the search.
        weights: see `MLLM.answer_logits`.
    """
    before = read_at(mllm, asked, [site], weights)[site.path][1][asked.plain]
    before = before.to(torch.promote_types(before.dtype, torch.float32))
    norm = before.norm(dim=1, keepdim=True).clamp(min=1e-12)
    unit = norm / before.shape[1] ** 0.5
    free = torch.zeros_like(before, requires_grad=True)  # the shift in units of `unit`
    going = torch.ones(len(before), dtype=torch.bool, device=before.device)
    cuda = free.is_cuda
    optimiser = torch.optim.Adam([free], lr=options.lr, fused=cuda or None, capturable=cuda)
    losses = _losses(mllm, asked, site, weights, options)
    steps, step = [0] * len(before), 0

    def gradients() -> Tensor:
        with torch.enable_grad():
            shift = free * unit
            each = losses(shift) + options.decay * (shift / norm).square().sum(1)
            going.copy_(each.detach() >= options.enough)
            if step < options.steps and bool(going.any()):
                (free.grad,) = torch.autograd.grad(each.sum(), free)
        return torch.cat([each.detach(), going.to(each)])

    @torch.no_grad()
    def update() -> None:
        kept = free.detach().clone()
        optimiser.step()
        size = (free * unit).norm(dim=1, keepdim=True)
        free.mul_((options.clamp * norm / size.clamp(min=1e-12)).clamp(max=1))
        free.copy_(torch.where(going[:, None], free, kept))

    with Steps(gradients, update, before.device) as taken:
        while True:
            numbers = taken.gradients()
            on = numbers[len(before) :]
            if step == options.steps or not any(on):
                break
            taken.update()
            steps = [n + int(more) for n, more in zip(steps, on, strict=True)]
            step += 1
    return Values((free * unit).detach(), before, numbers[: len(before)], steps)


def _losses(
    mllm: MLLM,
    asked: Contexts,
    site: Site,
    weights: Mapping[str, Tensor],
    options: ValueOptions,
) -> Callable[[Tensor], Tensor]:
    """Shift [m, d] -> [m]: -log p of each target, mean over its contexts, and the essence's KL."""
    batch, essence = asked.batch, asked.essences
    owners = asked.owner[essence]
    at = _at(mllm, asked, site)

    def scores(shift: Tensor | None) -> Tensor:
        def see(part: Part, given: Tensor, out: Tensor) -> Tensor | None:
            if shift is None:
                return None
            spots = torch.nn.functional.one_hot(at(part, out.shape[1]), out.shape[1])
            own = shift[asked.owner[part.rows]]
            return (out.to(own) + spots[..., None].to(own) * own[:, None]).to(out.dtype)

        with tapped(batch, {site.path: (site.module, see)}):
            return mllm.answer_logits(batch, weights)

    def first(logits: Tensor) -> Tensor:
        rows = logits[essence, 0]
        return rows.to(torch.promote_types(rows.dtype, torch.float32)).log_softmax(-1)

    with torch.no_grad():
        had = first(scores(None)) if len(essence) else None

    def losses(shift: Tensor) -> Tensor:
        logits = scores(shift)
        logs = log_probabilities(logits, batch.target_ids, batch.target_mask)
        nll = -logs.sum(1) / batch.target_mask.sum(1)
        found = asked.mean(nll[:, None])[:, 0]
        if had is None:
            return found
        moved = (had.exp() * (had - first(logits))).sum(-1)
        return found.index_add(0, owners, (options.kl * moved).to(found))

    return losses


_At = Callable[["Part", int], Tensor]


def _at(mllm: MLLM, asked: Contexts, site: Site) -> _At:
    """part, tokens read -> [k] the places of its rows."""
    stack = stack_of(mllm.backbone, site)
    return lambda part, length: index_of(asked.batch, part, stack, asked.columns, length)


def _rows(asked: Contexts, states: Tensor) -> Tensor:
    return states.new_zeros(len(asked.batch), states.shape[-1])
