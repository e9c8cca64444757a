"""SERAC: a memory of edits, a scope that says which questions they are about, and a counterfactual.

Trained, the scope is two projections, of words and of image, and the counterfactual model reads the
edit with a change of low rank on top of the model. Untrained, the scope is a pair of cosines and
the counterfactual model is the model itself. There is one memory for words and images: `region`
says where the change of low rank sits, in the part that sees or in the language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from editing.edits import set_aside, unedited
from editing.features import features_of
from editing.fingerprints import Fingerprint
from editing.meta.base import TrainedEditor, TrainedOptions
from editing.meta.gradients import matrices_of
from editing.methods.memory import Memory
from editing.methods.serac_memory import Fact, Mix, Read, Rules, SeracEdit, read_by_scope
from editing.methods.serac_network import Adapter, FixedScope, SeracNetwork, TrainedScope
from editing.methods.serac_scope import HARD
from editing.methods.serac_training import counterfactual_losses, scope_loss
from editing.ranges import Count, Positive, Share
from editing.regions import Region, RegionName

if TYPE_CHECKING:
    from editing.edits import Edit
    from editing.mllm import MLLM
    from editing.requests import EditRecord, EditRequest


@dataclass(frozen=True)
class SeracOptions(TrainedOptions):
    """Settings of SERAC.

    Attributes:
        trained: a folder that `mmtune edit-train` wrote. Empty, the scope is fixed: cosines of
            frozen features, with `words_near` and `image_near`.
        region: where the counterfactual model's change of low rank sits, when it is trained.
        rank: of that change; 0 trains the scope alone.
        width: of the scope's projections.
        scope_lr: the learning rate of the scope. Where it is large, the images of training are told
            apart by what tells no others apart.
        scope: "question" reads what is asked; "reference" its right answer too, as the released
            code does, by which it is told what it is to find out. For comparisons only.
        mix: "hard" takes the counterfactual answer where the similarity is above `above`, and
            leaves all else untouched; "soft" mixes the probabilities of both by the similarity;
            "reference" as the released code does, of all questions and with its epsilon. Answers
            that are written, not scored, are those of the hard switch in all three.
        above: similarity, from 0 to 1.
        words_near: cosine of the fixed scope, see `FixedScope`.
        image_near: the same of images.
        locality: weight of what a counterfactual model does to questions that are not about the
            edit, should the scope be mistaken.
        seed: of what is drawn where no generator is given.
    """

    region: RegionName | Region = "language"
    rank: Annotated[int, Field(ge=0)] = 8
    width: Count = 128
    scope_lr: Positive = 1e-4
    scope: Read = "question"
    mix: Mix = "hard"
    above: Annotated[float, Field(ge=0, lt=1)] = HARD
    words_near: Share = 0.9
    image_near: Share = 0.9
    locality: Annotated[float, Field(ge=0)] = 0.1


class Serac(TrainedEditor):
    """Cached edits, each question answered by the one that it is about.

        p(y | x)  becomes  counterfactual(y | edit i, x)    where similarity(x, edit i) > above,
                                                            i the edit most like x

    Numbers changed: none of the model's; an edit adds its text and the features of its question.
    """

    name: ClassVar[str] = "serac"
    summary: ClassVar[str] = "a memory of edits, a scope for each, and a counterfactual model"
    source: ClassVar[str] = "SERAC, arXiv 2206.06520; multimodal in MMEdit, arXiv 2310.08475"
    options: ClassVar[type] = SeracOptions
    free: ClassVar[tuple[str, ...]] = (
        "trained", "seed", "mix", "above", "words_near", "image_near",
    )  # fmt: skip

    def weights(self, mllm: MLLM) -> Mapping[str, Tensor]:
        return matrices_of(mllm, self.settings.region)

    def begin(self, mllm: MLLM, generator: torch.Generator) -> SeracNetwork:
        width = mllm.backbone.trunks()["language"].width
        scope = TrainedScope(width, self.settings.width, generator)
        if not self.settings.rank:
            return SeracNetwork(scope)
        shapes = {
            name.removesuffix(".weight"): (weight.shape[0], weight.shape[1])
            for name, weight in self.weights(mllm).items()
        }
        return SeracNetwork(scope, Adapter(shapes, self.settings.rank, generator))

    def network(self, mllm: MLLM) -> nn.Module:
        """The trained one or, where none is named, that of the fixed scope."""
        if not self.settings.trained and mllm.model not in self._networks:
            fixed = FixedScope(self.settings.words_near, self.settings.image_near)
            self._networks[mllm.model] = SeracNetwork(fixed).eval()
        return super().network(mllm)

    def groups(self, network: nn.Module) -> list[dict[str, Any]]:
        serac = cast(SeracNetwork, network)
        rest = [] if serac.adapter is None else list(serac.adapter.parameters())
        scope = {"params": list(serac.scope.parameters()), "lr": self.settings.scope_lr}
        return [scope, {"params": rest}] if rest else [scope]

    def losses(
        self,
        mllm: MLLM,
        network: nn.Module,
        records: Sequence[EditRecord],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        serac = cast(SeracNetwork, network)
        scope = cast(TrainedScope, serac.scope)
        found = {"scope": scope_loss(mllm, scope, records, self.settings.scope)}
        if serac.adapter is not None:
            found |= counterfactual_losses(mllm, serac, records, self.settings.locality)
        return found

    def edit_with(
        self,
        mllm: MLLM,
        network: nn.Module,
        requests: Sequence[EditRequest],
        generator: torch.Generator,
    ) -> Edit:
        chosen = self.settings
        facts = [Fact(r.question, r.target.strip()) for r in requests]
        with set_aside(mllm):  # questions are compared with it as the model reads them unedited
            features = features_of(mllm, read_by_scope(requests, chosen.scope))
        names = list(self.weights(mllm))
        return SeracEdit(
            Memory.of(facts, features),
            cast(SeracNetwork, network),
            Rules(chosen.mix, chosen.above, chosen.scope),
            Fingerprint.of(mllm.model, unedited(mllm.model, names)),
        )


EDITORS = (Serac,)
