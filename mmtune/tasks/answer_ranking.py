"""Choosing the most likely of given answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from mmtune.backbones import unwrapped
from mmtune.backbones.generation import log_probabilities
from mmtune.backbones.generative import READ

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmtune.backbones.generative import Generative

ROWS = 1024  # answers scored at once


class AnswerRanker:
    """Ranks a list of answers by log-likelihood, summed over tokens, the end token included.

    In two stages where there are more answers than `candidates`: the likelihood of the first token
    chooses the candidates (ties: the earlier in the list), that of the whole answer ranks them.

    Args:
        backbone: of the model.
        tokenizer: of the model.
        answers: the list.
        candidates: answers that are scored whole; None means all, which is exact.
        limit: tokens of an answer at most.
        after: a prompt that the answers follow.
        rows: answers scored at once.

    Source: ALBEF, arXiv 2107.07651, section 4; BLIP, arXiv 2201.12086. The released code smooths
    labels here too; this does not.
    """

    def __init__(
        self,
        backbone: Generative,
        tokenizer: Any,
        answers: Sequence[str],
        candidates: int | None = None,
        limit: int | None = None,
        after: str = "",
        rows: int = ROWS,
    ) -> None:
        self.backbone, self.answers, self.rows = backbone, list(answers), rows
        targets = backbone.targets(tokenizer, self.answers, limit, after)
        self.ids, self.mask = targets["target_ids"], targets["target_mask"]
        self.count = min(candidates or len(self.answers), len(self.answers))

    def best(self, model: nn.Module, batch: Mapping[str, Tensor]) -> list[str]:
        """The most likely answer to each prompt of `batch`; between equals the earlier in the list.

        Args:
            model: possibly wrapped, in eval mode, without gradients.
            batch: {pixel_values, input_ids, attention_mask} of b prompts.
        """
        stock = unwrapped(model)
        context = self.backbone.read(stock, **{name: batch[name] for name in READ})
        chosen = self._candidates(stock, context)
        scores = self._scores(stock, context, chosen)
        best = scores.max(1, keepdim=True).values
        first = (scores == best).int().argmax(1)
        return [self.answers[i] for i in chosen.gather(1, first[:, None])[:, 0].tolist()]

    def _candidates(self, stock: Any, context: Mapping[str, Tensor]) -> Tensor:
        """[b, k] indices of the answers that are scored whole, in the order of the list."""
        some = next(iter(context.values()))
        if self.count == len(self.answers):
            every = torch.arange(self.count, device=some.device)
            return every.expand(len(some), -1)
        firsts = self.ids[:, 0].to(some.device)
        asked = firsts[:1].expand(len(some), 1)
        logits = self.backbone.continued(stock, context, asked, torch.ones_like(asked))
        likely = logits[:, 0].float()[:, firsts].argsort(dim=1, descending=True, stable=True)
        return likely[:, : self.count].sort(dim=1).values

    def _scores(self, stock: Any, context: Mapping[str, Tensor], chosen: Tensor) -> Tensor:
        """[b, k] log-likelihoods."""
        owner = torch.arange(len(chosen), device=chosen.device).repeat_interleave(self.count)
        ids, masks = self.ids.to(chosen.device), self.mask.to(chosen.device)
        parts = []
        for own, which in zip(
            owner.split(self.rows), chosen.reshape(-1).split(self.rows), strict=True
        ):
            length = int(masks[which].sum(1).max())
            target, mask = ids[which, :length], masks[which, :length]
            rows = {name: value[own] for name, value in context.items()}
            logits = self.backbone.continued(stock, rows, target, mask)
            parts.append(log_probabilities(logits, target, mask).sum(1))
        return torch.cat(parts).view(chosen.shape)
