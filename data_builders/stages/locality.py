"""What an edit must leave alone: questions that the model answers steadily, two for a sample.

`Twice` looks for such questions in the pools. `join` sees all samples at once: it puts each into a
split, and gives it a question without an image and one about another image.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from data_builders.general_facts import is_right
from data_builders.keepers import Digests, Pool, dealt, entries_of
from data_builders.partition import splits_of
from data_builders.samples import Outcome, Rejected, Sample, seed_of
from data_builders.stages.asking import ask, open_model
from data_builders.stages.base import Stage
from data_builders.stages.select import UnitShare, agreed
from editing.ranges import Count
from mmtune.data.records import ImageProblem
from mmtune.data.texts import normalised
from mmtune.metrics.vqa import accuracy, processed

if TYPE_CHECKING:
    from data_builders.pictures import Pictures
    from data_builders.stages.asking import Answer

DIFFER, WRONG, SILENT, LONG = "answers differ", "the model is wrong", "no answer", "answer too long"
NONE_LEFT, ANOTHER_SPLIT = "no keeper left", "image in another split"
SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
Part = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class TwiceOptions:
    """When a question is answered steadily, and which answer is kept.

    Attributes:
        again: how it is asked the second time, with {question}. A greedy answer to the same words
            would always be the same.
        rephrase: where the source has the question in other words, these are asked instead.
        answer: what an edit must not change: "model", what the model said first; "data", what most
            annotators said, where the model is right, else the same.
        require_right: take only questions that are answered rightly.
        threshold: the VQA accuracy from which an answer about an image is right. Without an image,
            where models answer in sentences, one is right that holds an answer of the data.
        max_words: of an answer.
        batch_size: questions asked at once.
    """

    again: str = "{question} Answer briefly."
    rephrase: bool = True
    answer: Literal["model", "data"] = "model"
    require_right: bool = True
    threshold: UnitShare = 0.3
    max_words: Count = 16
    batch_size: Count = 16

    def __post_init__(self) -> None:
        if "{question}" not in self.again or self.again.strip() == "{question}":
            text = "again must hold {question} and other words, or both answers are the same"
            raise ValueError(f"{text}; got {self.again!r}")


class Twice(Stage[TwiceOptions]):
    """Questions that the model answers in the same words when asked in others.

    The answer to be kept becomes the `target`, and what the model said first the `prediction`.
    """

    slot: ClassVar[str] = "consistent"
    name: ClassVar[str] = "twice"
    options: ClassVar[type] = TwiceOptions
    answer: Answer

    def open(self) -> None:
        self.answer = open_model(self.context).answer

    def run(self, samples: Sequence[Sample]) -> list[Outcome]:
        pictures, size = self.context.pictures, self.settings.batch_size
        answered = [sample for sample in samples if sample.answers]
        first = ask(self.answer, answered, [s.question for s in answered], pictures, size)
        pairs = zip(answered, first, strict=True)
        told: dict[str, str | Rejected] = {s.id: self._usable(s, said) for s, said in pairs}
        left = [sample for sample in answered if isinstance(told[sample.id], str)]
        second = ask(self.answer, left, [self._again(s) for s in left], pictures, size)
        after = dict(zip((sample.id for sample in left), second, strict=True))
        return [
            self._outcome(s, told.get(s.id, Rejected(s.id, "no answers")), after.get(s.id))
            for s in samples
        ]

    def _again(self, sample: Sample) -> str:
        other = sample.fields.get("rephrase")
        if self.settings.rephrase and other and normalised(other) != normalised(sample.question):
            return other
        return self.settings.again.replace("{question}", sample.question)

    def _usable(self, sample: Sample, said: str | Rejected) -> str | Rejected:
        """The first answer, or why it cannot be kept whatever the second is."""
        if isinstance(said, Rejected):
            return said
        if not processed(said):
            return Rejected(sample.id, SILENT, repr(said))
        if len(said.split()) > self.settings.max_words:
            return Rejected(sample.id, LONG, f"{said!r:.80}, over {self.settings.max_words} words")
        if self.settings.require_right and not self._right(sample, said):
            return Rejected(sample.id, WRONG, f"{said!r:.80}, not {sample.answers[0]!r:.80}")
        return said

    def _right(self, sample: Sample, said: str) -> bool:
        if sample.image:
            return accuracy(said, sample.answers) >= max(self.settings.threshold, 1e-9)
        return any(is_right(said, answer) for answer in sample.answers)

    def _outcome(
        self, sample: Sample, first: str | Rejected, second: str | Rejected | None
    ) -> Outcome:
        if isinstance(first, Rejected):
            return first
        if isinstance(second, Rejected) or second is None:
            return second or Rejected(sample.id, SILENT)
        if processed(first) != processed(second):
            return Rejected(sample.id, DIFFER, f"{first!r:.80}, then {second!r:.80}")
        kept = first
        if self.settings.answer == "data" and self._right(sample, first):
            kept = agreed(sample.answers, 0.0) or sample.answers[0]
        return sample.with_(target=kept, prediction=first)


@dataclass(frozen=True)
class LocalityOptions:
    """How samples get their split and what must not change beside them.

    Attributes:
        splits: name of a file -> its part of the samples, in any unit. Samples that share an image,
            as the edited or the generality one, are in one split.
        reuse: where a split needs more questions than its part of a pool has, take them again, all
            equally often; false sets the samples aside that get none.
    """

    splits: dict[str, Part] = field(default_factory=lambda: {"train": 0.8, "eval": 0.2})
    reuse: bool = False

    def __post_init__(self) -> None:
        wrong = [name for name in self.splits if not SPLIT_NAME.fullmatch(name)]
        if wrong or not self.splits:
            got = repr(wrong[0]) if wrong else "none"
            text = "splits must be named by letters, digits, '_' and '-', such as train: 0.8"
            raise ValueError(f"{text}; got {got}")


def join(
    samples: Sequence[Sample],
    text_pool: Sequence[Sample],
    image_pool: Sequence[Sample],
    seed: int,
    settings: LocalityOptions,
    pictures: Pictures,
) -> list[Outcome]:
    """Give every sample its split, a question without an image, and one about another image.

    An image of the pool that a sample of any split edits, or generalises to, is not used; images
    are compared by their bytes. No question and no image of a pool is in two splits. A question is
    taken whose answer is not the sample's target: about another concept before the same one, unused
    before used, of the sample's kind before another. The order of samples and pools is irrelevant.

    Args:
        samples: with target, image and image_rephrase; one that has a split keeps it.
        text_pool, image_pool: as `Twice` leaves them; of others the first answer is kept.
        seed: of the build.
        settings: see its class.
        pictures: where images are.

    Returns:
        one outcome a sample, in the order given.
    """
    digests = Digests(pictures)
    keys: dict[str, list[str]] = {}
    broken: dict[str, Rejected] = {}
    for sample in samples:
        try:
            own = [digests.of(r) for r in (sample.image, sample.image_rephrase) if r]
            keys[sample.id] = own or [f"no image: {sample.id}"]
        except ImageProblem as error:
            broken[sample.id] = Rejected(sample.id, error.reason, error.text, fault=True)
    fixed = {s.id: s.split for s in samples if s.split and s.id in keys}
    split = splits_of(keys, seed, settings.splits, fixed)
    need = Counter(split.values())
    scope = {key for own in keys.values() for key in own}
    texts = entries_of(text_pool, lambda s: normalised(s.question), "text", seed)
    images = entries_of(image_pool, lambda s: digests.or_none(s.image), "image", seed)
    images = [entry for entry in images if entry.key not in scope]
    pools = [dealt(pool, need, seed, settings.reuse) for pool in (texts, images)]
    found: dict[str, Outcome] = dict(broken)
    for sample in sorted(samples, key=lambda s: (seed_of(seed, "locality", s.id), s.id)):
        if sample.id not in broken:
            found[sample.id] = _joined(sample, split[sample.id], pools)
    return [found[sample.id] for sample in samples]


def _joined(sample: Sample, split: str, pools: Sequence[Mapping[str, Pool]]) -> Outcome:
    if sample.split and sample.split != split:
        text = f"it is to be in {sample.split}, and most of those that share its image in {split}"
        return Rejected(sample.id, ANOTHER_SPLIT, text)
    text, image = (pool[split].best(sample) for pool in pools)
    if text is None or image is None:
        kinds = zip(("text", "image"), (text, image), strict=True)
        missing = " and ".join(name for name, entry in kinds if entry is None)
        hint = "name larger pools, or allow locality.reuse"
        return Rejected(sample.id, NONE_LEFT, f"{missing} pool, split {split}: {hint}")
    for pool, entry in zip(pools, (text, image), strict=True):
        pool[split].use(entry)
    return sample.with_(split=split, text_locality=text.keeper(), image_locality=image.keeper())


STAGES = (Twice,)
