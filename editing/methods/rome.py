"""ROME: one layer's fc2 is an associative memory, into which one key and value are written.

W <- W + (v* - W k) (C^-1 k)^T / (k^T C^-1 k): of all W' with W' k = v*, the one whose change D has
the least E|D k'|^2 = tr(D C D^T) over the keys k' that the model usually looks up.

Source: Meng et al., Locating and Editing Factual Associations in GPT, arXiv 2202.05262, equation 2
and appendix A. As in the released code, the direction C^-1 k is that of the mean key over contexts,
and the value is met at the key of the request as it stands. It differs from that code in how values
are sought, see `editing.closed_form.values`, and in what C is the mean of, see
`editing.closed_form.texts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from editing.changes import Change, LowRank, exact_dtype
from editing.closed_form.base import ClosedForm, ClosedFormOptions
from editing.closed_form.covariances import covariances
from editing.closed_form.values import contexts_of, in_contexts, read_at, values_of
from editing.weight_edits import WeightEdit

if TYPE_CHECKING:
    from editing.edits import Edit
    from editing.mllm import MLLM
    from editing.requests import EditRequest


@dataclass(frozen=True)
class RomeOptions(ClosedFormOptions):
    """Settings of ROME.

    Attributes:
        layer: of the language branch, negative ones count from its end; None takes one by its
            depth, see `ClosedForm.places`.
    """

    layer: int | None = None


def rank_one(shift: Tensor, key: Tensor, direction: Tensor) -> LowRank:
    """The change D with D key = shift whose rows lie along `direction`.

    With direction = C^-1 key it is the least in tr(D C D^T).

    Args:
        shift: [e] what is to be added to the layer's output at the key.
        key: [d].
        direction: [d], not orthogonal to the key.
    """
    return LowRank(shift[:, None], (direction / (direction @ key))[None])


class Rome(ClosedForm):
    """ROME; several requests are written one after the other.

        W <- W + (v* - W k) (C^-1 k)^T / (k^T C^-1 k)

    Numbers changed: all of one layer's fc2, by a matrix of rank 1 for each request.
    """

    name: ClassVar[str] = "rome"
    summary: ClassVar[str] = "one key and value written into one layer's MLP in closed form"
    source: ClassVar[str] = "ROME, arXiv 2202.05262"
    options: ClassVar[type] = RomeOptions

    def make(self, mllm: MLLM, requests: Sequence[EditRequest], generator: torch.Generator) -> Edit:
        options = self.settings
        chosen = self.places(mllm, None if options.layer is None else [options.layer], 1)
        ((name, (site, weight)),) = chosen.items()
        (covariance,) = covariances(mllm, [site], options.covariance)
        prefixes = self.prefixes(mllm, generator)
        change: Change | None = None
        losses, steps = [], []
        with in_contexts(mllm):
            for request in requests:
                asked = contexts_of(mllm, [request], options.place, prefixes, [name])
                with torch.no_grad():
                    weights = {} if change is None else {name: change.on(weight)}
                values = values_of(mllm, asked, site, options.value, weights)
                keys = read_at(mllm, asked, [site], weights)[site.path][0].double()
                direction = covariance.solved(asked.mean(keys))[0].to(keys)
                shift = values.shift[0].to(keys)
                exact = _stored(rank_one(shift, keys[asked.plain][0], direction), weight)
                change = exact if change is None else change.then(exact)
                losses += values.loss
                steps += values.steps
        assert change is not None  # there is a request
        about = {
            "layers": [site.layer],
            "covariance_tokens": covariance.tokens,
            "loss": losses,
            "steps": steps,
        }
        return WeightEdit.of(mllm, {name: change}, about)


def _stored(change: LowRank, weight: Tensor) -> LowRank:
    """In the precision in which it will be added."""
    exact = exact_dtype(weight)
    return LowRank(change.left.to(exact), change.right.to(exact))


EDITORS = (Rome,)
