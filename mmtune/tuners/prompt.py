"""Prompt tuning: virtual tokens at the input of a branch; several prompts in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtune.backbones import backbone_of
from mmtune.backbones.base import Backbone, PairEmbeddings
from mmtune.backbones.trunks import Trunk
from mmtune.tuners.registry import Method, config_of, options_of
from mmtune.tuners.virtual_tokens import TrunkTokens, VirtualTokensConfig, VirtualTokensTuner


@dataclass
class PromptConfig(VirtualTokensConfig):
    """Prompt tuning: p learned vectors enter each branch at its start.

        branch([begin; P_1; ..; P_p; x_1; ..; x_n]),    P [p, d] learned

    They enter behind a class or begin token, ahead of the words or patches, after the position
    embeddings: words keep the positions that they have without a prompt. A fresh prompt changes the
    outputs.

    Trainable parameters: p d for each branch of width d.

    Args:
        init: "vocabulary" starts from p random rows of the branch's token embeddings, "text" from
            the embeddings of `init_ids`, "uniform" from U(-0.5, 0.5). A branch without a vocabulary
            (vision) starts from the last in every case.
        init_ids: token ids for init: text, such as tokenize(["a photo of a"])["input_ids"] without
            its begin and end tokens; repeated or cut to p.
        tokens, branches, layers, seed, adapted: see `VirtualTokensConfig`.

    Source:
        "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021, arXiv 2104.08691,
        sections 2 and 3.2. Differs in that "vocabulary" draws from all tokens rather than from the
        5,000 most common, and that embeddings include the positions of the first p words.
    """

    peft_name: ClassVar[str] = "PROMPT"
    key: ClassVar[str] = "prompt"

    init: Literal["vocabulary", "text", "uniform"] = "vocabulary"
    init_ids: list[int] = field(default_factory=list)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.init not in ("vocabulary", "text", "uniform"):
            yield f"prompt.init must be vocabulary, text or uniform, got {self.init!r}"
        if self.init == "text" and not self.init_ids:
            yield "prompt.init: text needs prompt.init_ids, the ids of the text's tokens"
        if self.init != "text" and self.init_ids:
            yield f"prompt.init_ids has no use with init: {self.init}; set init: text"


class PromptTokens(TrunkTokens):
    """A prompt for each adapter of one branch."""

    def add_adapter(self, name: str, tokens: Tensor) -> None:
        self.mmtune_tokens[name] = nn.Parameter(tokens)
        self.at[name] = (self.trunk.start,) * len(tokens)


class PromptModel(VirtualTokensTuner):
    """Injects `PromptTokens` into the trunk of each chosen branch."""

    attribute = "prompt"
    tuner_layer_cls = PromptTokens

    def _choose(self, backbone: Backbone, config: Any) -> Sequence[Trunk]:
        trunks = super()._choose(backbone, config)
        self._vocabularies = {t.branch: _vocabulary(backbone, t) for t in trunks}
        for branch, vocabulary in self._vocabularies.items():
            if vocabulary is not None:
                _check_ids(config.init_ids, branch, vocabulary.num_embeddings)
        return trunks

    def _fill(self, holder: PromptTokens, adapter_name: str, config: PromptConfig) -> None:
        holder.add_adapter(adapter_name, self._start(holder.trunk, config))

    def _start(self, trunk: Trunk, config: PromptConfig) -> Tensor:
        """The tokens before training, [p, d] in float32."""
        p, vocabulary = config.tokens, self._vocabularies[trunk.branch]
        if config.init == "uniform" or vocabulary is None or trunk.embed is None:
            return torch.rand(p, trunk.width, generator=self._generator) - 0.5
        if config.init == "text":
            repeats = -(-p // len(config.init_ids))
            ids = torch.tensor((config.init_ids * repeats)[:p])
        else:
            ids = torch.randint(vocabulary.num_embeddings, (p,), generator=self._generator)
        with torch.no_grad():
            return trunk.embed(ids.to(vocabulary.weight.device)).float().clone()


def _vocabulary(backbone: Backbone, trunk: Trunk) -> Any:
    """The token embedding of a trunk's branch, or None."""
    for site in backbone.sites():
        if site.branch == trunk.branch and hasattr(site.module, "num_embeddings"):
            return site.module if trunk.embed is not None else None
    return None


def _check_ids(ids: Sequence[int], branch: str, size: int) -> None:
    wrong = [i for i in ids if not 0 <= i < size]
    if wrong:
        raise ValueError(
            f"prompt.init_ids must be in 0..{size - 1}, the vocabulary of {branch}, got {wrong[0]}"
        )


@contextmanager
def ensembled(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Give each of K adapters its own block of a batch.

    Inside, a batch of K b rows is read as K blocks of b rows, and block k takes adapter names[k].
    The frozen model runs once. Works for prompt tuning and P-tuning; which adapters are active has
    no influence.

    Args:
        model: a PeftModel with several prompts of equal length on the same branches.
        names: the adapters, one for each block.

    Raises:
        ValueError: an adapter that some branch does not have, or prompts that enter at different
            places.

    Source:
        arXiv 2104.08691, section 6.
    """
    layers = [m for m in model.modules() if isinstance(m, TrunkTokens) and len(m.mmtune_tokens)]
    if not layers or not names:
        raise ValueError(
            f"an ensemble needs a model with prompts and their names, got {len(layers)} branches "
            f"with prompts and {len(names)} names"
        )
    for layer in layers:
        missing = [n for n in names if n not in layer.mmtune_tokens]
        if missing:
            raise ValueError(
                f"no prompt {missing[0]!r} in {layer.trunk.branch}; "
                f"it has {', '.join(layer.mmtune_tokens)}"
            )
        places = {n: layer.at[n] for n in names}
        if len(set(places.values())) > 1:
            told = ", ".join(f"{n}: {len(at)} tokens at {at}" for n, at in places.items())
            raise ValueError(
                f"prompts of one ensemble must enter {layer.trunk.branch} at the same places, "
                f"got {told}"
            )
    before = [layer.ensemble for layer in layers]
    try:
        for layer in layers:
            layer.ensemble = tuple(names)
        yield
    finally:
        for layer, names_before in zip(layers, before, strict=True):
            layer.ensemble = names_before


def ensemble_embeddings(
    model: nn.Module, batch: Mapping[str, Tensor], names: Sequence[str]
) -> PairEmbeddings:
    """Embeddings of a batch under several prompts, averaged: one forward pass.

    Args:
        model: see `ensembled`.
        batch: as for `Backbone.embed_pairs`, of b images and b texts.
        names: the adapters.

    Returns:
        The mean over prompts of the L2-normalised embeddings, L2-normalised again; each [b, e].
    """
    repeated = {key: torch.cat([value] * len(names)) for key, value in batch.items()}
    with ensembled(model, names):
        pairs = backbone_of(model).embed_pairs(model, repeated)
    image, text = (
        F.normalize(x.unflatten(0, (len(names), -1)).mean(0), dim=-1)
        for x in (pairs.image, pairs.text)
    )
    return PairEmbeddings(image, text, pairs.scale, pairs.bias)


def majority_vote(predictions: Tensor) -> Tensor:
    """The label that most of K prompts predict; among equally frequent ones the lowest.

    Shape: [K, n] integers -> [n].

    Raises:
        ValueError: another shape, or labels that are no integers.
    """
    if predictions.dim() != 2 or not len(predictions) or predictions.is_floating_point():
        raise ValueError(
            "majority_vote takes the integer labels of K prompts for n samples, [K, n]; got "
            f"{list(predictions.shape)} of {predictions.dtype}"
        )
    votes = (predictions[:, None] == predictions[None]).sum(0)  # [K, n]
    behind = votes < votes.amax(0)
    return predictions.masked_fill(behind, torch.iinfo(predictions.dtype).max).amin(0)


PEFT_METHODS = {PromptConfig.peft_name: (PromptConfig, PromptModel)}
METHODS = (
    Method(
        name="prompt",
        summary="virtual tokens at the input of a branch; several prompts in one batch",
        source="arXiv 2104.08691 (EMNLP 2021)",
        options=options_of(PromptConfig, leave_out=["adapted", "layers"]),
        build=config_of(PromptConfig),
    ),
)
