"""The second stage of BLIP's retrieval: the best answers by features, ranked again by match score.

An image and a text are read together at most once, though each may be an answer of the other's
query. Pairs are scored image by image: hidden states of one batch of images are all that is held,
and an image's keys and values serve all of its texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmtune.metrics.recall import CHUNK, Scores

if TYPE_CHECKING:
    from mmtune.backbones.blip_matching import Matching


def shortlist(queries: Tensor, answers: Tensor, count: int) -> Tensor:
    """The best answers by cosine: [q, e], [a, e] -> [q, min(count, a)]."""
    scores = Scores(queries, answers)
    count = min(count, len(answers))
    rows = [scores[i : i + CHUNK].topk(count, dim=1).indices for i in range(0, len(queries), CHUNK)]
    return torch.cat(rows)


@dataclass(frozen=True)
class PairScores:
    """Match scores of some of n images x m texts.

    Attributes:
        keys: [p] of image * m + text, ascending.
        scores: [p].
        texts: m.
    """

    keys: Tensor
    scores: Tensor
    texts: int

    @classmethod
    def of_shortlists(cls, texts_of: Tensor, images_of: Tensor) -> PairScores:
        """The pairs of two shortlists, [n, k] of texts and [m, k] of images; scores are zero."""
        n, m = len(texts_of), len(images_of)
        image = torch.arange(n, device=texts_of.device)[:, None]
        text = torch.arange(m, device=texts_of.device)[:, None]
        keys = torch.cat([(image * m + texts_of).flatten(), (images_of * m + text).flatten()])
        keys = keys.unique()
        return cls(keys, torch.zeros(len(keys), device=keys.device), m)

    def of(self, image: Tensor, text: Tensor) -> Tensor:
        """Scores of pairs that are among them; both broadcast."""
        return self.scores[torch.searchsorted(self.keys, image * self.texts + text)]

    def fill(
        self,
        matching: Matching,
        pixels: Iterator[Tensor],
        tokens: dict[str, Tensor],
        batch_size: int,
        bar: Any,
    ) -> None:
        """Compute the scores.

        Args:
            matching: the model's parts.
            pixels: [b, 3, s, s] of all images, in order.
            tokens: input_ids and attention_mask [m, t] of all texts.
            batch_size: texts read with an image at once.
            bar: advances by pairs.
        """
        image = 0
        for batch in pixels:
            states = matching.image_states(batch)
            for own in states.split(1):
                ends = self.keys.new_tensor([image * self.texts, (image + 1) * self.texts])
                start, stop = torch.searchsorted(self.keys, ends).tolist()
                for i in range(start, stop, batch_size):
                    part = slice(i, min(i + batch_size, stop))
                    ids, mask = _chosen(tokens, self.keys[part] % self.texts)
                    logits = matching.logits(matching.fused(ids, mask, own))
                    self.scores[part] = logits[:, 1].float()
                    bar.update(len(ids))
                image += 1


def _chosen(tokens: dict[str, Tensor], texts: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and mask of some texts, no wider than the longest of them."""
    ids, mask = tokens["input_ids"][texts], tokens["attention_mask"][texts]
    width = int(mask.any(0).nonzero().max()) + 1
    return ids[:, :width], mask[:, :width]


class Reranked(Scores):
    """Scores whose rows hold, for the shortlisted answers, cosine + match score.

    Shortlisted answers come before all others, which keep their order by cosine. Rows are float64,
    and what lifts a row's shortlist above the rest is added to all of it alike: only the order
    within a row means something.

    Args:
        queries: [q, e], L2-normalised.
        answers: [a, e], L2-normalised.
        top: [q, k] shortlisted answers.
        match: [q, k] their match scores.
        columns: [c] which answer each column holds; None means each once, in order.

    Source:
        The evaluation in BLIP's released code (arXiv 2201.12086), where all answers outside the
        shortlist tie.
    """

    def __init__(
        self,
        queries: Tensor,
        answers: Tensor,
        top: Tensor,
        match: Tensor,
        columns: Tensor | None = None,
    ) -> None:
        super().__init__(queries, answers)
        self.top, self.match, self.columns = top, match, columns
        if columns is not None:
            self.shape = (len(queries), len(columns))

    def __getitem__(self, rows: slice) -> Tensor:
        cosines = super().__getitem__(rows).double()
        top = self.top[rows]
        both = cosines.gather(1, top) + self.match[rows].double()
        lift = cosines.amax(1, keepdim=True) - both.amin(1, keepdim=True) + 1
        found = cosines.scatter(1, top, both + lift)
        return found if self.columns is None else found[:, self.columns]
