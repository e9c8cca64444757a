"""A multimodal language model that is asked: what editors, edits and metrics see of it.

The model stays a stock transformers model; its backbone says all that differs between families:
templates, how prompts with and without an image are read, where a target starts (its scores are
lined up by `Generative.continued`), and, by its sites, which regions it has. A new family is a
`mmtune.backbones.generative.Generative` with `text_prompts`, `everywhere` and `prefaced`, and
nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editing.batches import Batch, Interceptor, Part, Sequences, probe_of
from editing.metrics.answers import IGNORED
from editing.packed import Packer
from editing.prefixes import passing, prefixed
from editing.requests import EditRequest, Probe
from editing.room import positions_of, require_room
from editing.swapping import Swapping
from mmtune.backbones.generation import Decoding, log_probabilities, padded, texts_of
from mmtune.backbones.generative import Generative
from mmtune.data.images import load_image
from mmtune.data.transforms import EvalTransform

if TYPE_CHECKING:
    from mmtune.backbones.base import Loaded
    from mmtune.data.records import MediaRef

WRITTEN = 20  # new tokens at most, unless an answer that is known is longer


class MLLM:
    """A stock model with what it needs to be asked.

    It is put in eval mode and frozen: gradients go to the tensors given as `weights` alone.

    Attributes:
        model: the stock model, its fused attention shown as q, k, v, out.
        backbone: its family's view of it.
        tokenizer: its tokenizer.
        name: what it was loaded by.
        around: the interceptors of applied edits, in the order in which these were applied.

    Args:
        loaded: a model that writes text, with its tokenizer.
        templates: `question`, `text` (no image) or `caption` in place of the family's own.

    Raises:
        ValueError: a model that does not write text, came without a tokenizer or is wrapped; an
            unknown template, or one without {question}.
    """

    def __init__(self, loaded: Loaded, templates: Mapping[str, str] | None = None) -> None:
        backbone = loaded.backbone
        if not isinstance(backbone, Generative) or not backbone.writes:
            raise ValueError(
                f"an edited model must write text, and {loaded.name} is a "
                f"{type(loaded.model).__name__}. Use BLIP-2, MiniGPT-4, LLaVA or Qwen-VL."
            )
        if loaded.tokenizer is None:
            raise ValueError(
                f"{loaded.name} was loaded without its tokenizer; set Loaded.tokenizer"
            )
        if backbone.model is not loaded.model:
            raise ValueError(
                f"edits are made to the stock model, got a {type(loaded.model).__name__} around "
                f"a {type(backbone.model).__name__}: merge its adapter and unload it first"
            )
        backbone.prepare()
        self.model = loaded.model.eval().requires_grad_(False)
        self.backbone = backbone
        self.tokenizer = loaded.tokenizer
        self.name = loaded.name
        self.around: list[Interceptor] = []
        self._swapping, self._packer = Swapping(self.model), Packer(self.model, backbone)
        self.templates = _templates(backbone.templates, templates or {})
        self._transform, self._processor = EvalTransform(loaded.image), loaded.processor

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def hooked(self) -> bool:
        """Whether something hooks a module: packed prompts keep rows of their own then."""
        return self._packer.hooked

    def batch(self, asked: Sequence[Probe | EditRequest]) -> Batch:
        """Probes, or requests with their targets as answers, as one batch.

        It holds the prefaces of the edits that are applied now.

        Raises:
            ValueError: nothing is asked; a request without target; a question without an image on a
                model that needs one; an image that cannot be used (`ImageProblem`).
        """
        probes = tuple(map(probe_of, asked))
        if not probes:
            raise ValueError("expected at least one probe or request, got none")
        prefaces = self._prefaces(probes)
        prompts = [self._prompt(p, text) for p, text in zip(probes, prefaces, strict=True)]
        rows = [
            self.backbone.targets(self.tokenizer, [probe.answer], after=prompt)["target_ids"][0]
            for probe, prompt in zip(probes, prompts, strict=True)
        ]
        ids, mask = padded([row.tolist() for row in rows], self.backbone.pad)
        groups = [
            [i for i, probe in enumerate(probes) if (probe.image is None) == bare]
            for bare in (False, True)
        ]
        parts = tuple(self._part(probes, prompts, rows) for rows in groups if rows)
        return Batch(probes, prefaces, parts, ids.to(self.device), mask.to(self.device))

    def pixels(self, images: Sequence[MediaRef]) -> dict[str, Tensor]:
        """Images as the model reads them, on its device and in its dtype.

        Returns:
            {pixel_values [k, 3, s, s]}; of a family that reads images of several sizes what its
            stock processor makes of them, {pixel_values [k, ...], image_sizes [k, 2]}.
        """
        distinct = list(dict.fromkeys(images))  # the probes of a record share theirs
        order = torch.tensor([distinct.index(image) for image in images])
        opened = [load_image(image) for image in distinct]
        if self._processor is None:
            seen = {"pixel_values": torch.stack([self._transform(image) for image in opened])}
        else:
            seen = self.backbone.pixels(self._processor, opened)
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        seen["pixel_values"] = seen["pixel_values"].to(dtype)
        return {name: value[order].to(self.device) for name, value in seen.items()}

    def cached(self, batch: Batch, names: Iterable[str]) -> Batch:
        """The same batch, computed once up to the first module that holds one of these parameters.

        Everything that takes a batch takes it, with the same numbers. The first pass of a kind
        (scores, whole sequences, writing) is a plain one that keeps what does not depend on the
        parameters, in memory, as long as the batch lives; later ones compute the rest only. What
        is kept is forgotten where something else below changes (an edit applied there): the next
        pass is a plain one again. It is good before an edit, under it, and for several editors.

        Args:
            batch: as `batch` makes it.
            names: the parameters that will change: the keys of `weights`, or of an edit's changes.

        Raises:
            ValueError: a name that is no parameter's.
        """
        return prefixed(self.model, batch, names)

    def answer_logits(self, batch: Batch, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """[n, t, v]: the scores from which each token of `batch.target_ids` is predicted.

        Which of them count says `batch.target_mask`, or `batch.answer_mask` without end tokens.

        Args:
            batch: as `batch` makes it, under the same edits that change what is read.
            weights: parameter name -> what to compute with in its place; differentiated through.
        """
        self._require_same_prefaces(batch)
        answer: Callable[[Batch], Tensor] = partial(self._logits, weights)
        for interceptor in self.around:
            answer = partial(interceptor.logits, inner=answer)
        return answer(batch)

    def nll(self, batch: Batch, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """[n] -log p of each answer, the mean over its tokens and its end token, nats."""
        logits = self.answer_logits(batch, weights)
        logs = log_probabilities(logits, batch.target_ids, batch.target_mask)
        return -logs.sum(1) / batch.target_mask.sum(1)

    @torch.no_grad()
    def answer(
        self,
        asked: Batch | Sequence[Probe | EditRequest],
        max_tokens: int | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> list[str]:
        """What the model says, written greedily and stripped.

        Args:
            asked: a batch, or probes.
            max_tokens: new tokens at most, the end included; None takes 20, or as many as the
                longest answer in the batch has.
            weights: see `answer_logits`.
        """
        batch = asked if isinstance(asked, Batch) else self.batch(asked)
        self._require_same_prefaces(batch)
        most = _most(batch, max_tokens)
        write: Callable[[Batch, Decoding], list[str]] = partial(self._written, weights)
        for interceptor in self.around:
            write = partial(interceptor.written, inner=write)
        return write(batch, Decoding(max_tokens=most))

    @torch.no_grad()
    def answers(
        self,
        batch: Batch,
        logits: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        max_tokens: int | None = None,
    ) -> list[str]:
        """What `answer` returns, where the scores are known: few answers have to be written.

        Where each token of a target, its end included, is the likeliest behind those before it,
        writing greedily chooses the same tokens one by one (by induction: the first, then the
        second behind the first), ends there, and is not written. Writing with a cache and scoring
        all at once round differently, so two tokens that score next to the same may change places.

        Args:
            batch: as `batch` makes it.
            logits: [n, t, v], its `answer_logits` with the same weights and edits.
            weights, max_tokens: see `answer`.
        """
        said = self.target_texts(batch)
        rows = [row for row, known in enumerate(self._known(batch, logits).tolist()) if not known]
        if rows:
            asked = batch if len(rows) == len(batch) else batch.chosen(rows)
            most = _most(batch, max_tokens)
            for row, text in zip(rows, self.answer(asked, most, weights), strict=True):
                said[row] = text
        return said

    @torch.no_grad()
    def scored_answers(
        self, batch: Batch, max_tokens: int | None = None
    ) -> tuple[Tensor, list[str]]:
        """`answer_logits` and `answers`, where both are wanted: the prompts are read once.

        Args:
            batch: as `batch` makes it.
            max_tokens: see `answer`; with 0 there are no answers, and the scores are the same bits.
        """
        self._require_same_prefaces(batch)
        others = any(i.apart or i.answers for i in self.around)
        passed = None if others else self._packer.scored(batch, self._read, writing=True)
        if passed is None:
            logits = self.answer_logits(batch)
            return logits, [] if max_tokens == 0 else self.answers(batch, logits, None, max_tokens)
        logits = passed.scores
        if max_tokens == 0:
            return logits, []
        said, known = self.target_texts(batch), self._known(batch, logits)
        if not bool(known.all()):
            most = Decoding(max_tokens=_most(batch, max_tokens))
            texts = texts_of(self.tokenizer, passed.written(most, known), self.backbone.ends)
            pairs = zip(said, texts, known.tolist(), strict=True)
            said = [target if hit else text for target, text, hit in pairs]
        return logits, said

    def _known(self, batch: Batch, logits: Tensor) -> Tensor:
        """[n] bool, whether an answer is its target, as the scores tell."""
        if any(i.strays for i in self.around):
            return torch.zeros(len(batch), dtype=torch.bool)
        return ((logits.argmax(-1) == batch.target_ids) | (batch.target_mask == 0)).all(1)

    def target_texts(self, batch: Batch) -> list[str]:
        """The answers as `answer` would return them: tokenized and read back."""
        return texts_of(self.tokenizer, batch.target_ids, self.backbone.ends)

    def sequences(self, batch: Batch) -> Sequences:
        """The scores of every token read, for definitions that count prompt and image as well.

        An encoder-decoder's sequences are its decoder's, begin token included.

        Raises:
            ValueError: probes with and without an image in one batch.
            TypeError: a family without such scores, or an edit that changes answers only.
        """
        self._require_same_prefaces(batch)
        if len(batch.parts) != 1:
            raise ValueError("expected probes that all have an image, or none; got both")
        score: Callable[[Batch], Sequences] = self._sequences
        for interceptor in self.around:
            score = partial(interceptor.sequences, inner=score)
        return score(batch)

    def _sequences(self, batch: Batch) -> Sequences:
        ids, mask = batch.target_ids, batch.target_mask
        with passing(batch.parts[0].prefix, "everywhere", batch.parts, (ids, mask)):
            context = self._read(batch.parts[0], batch.target_mask)
            logits = self.backbone.everywhere(self.model, context, ids, mask)
        given = logits.shape[1] - ids.shape[1] + 1  # tokens read before the first of the answer
        labels = ids.new_full(logits.shape[:2], IGNORED)
        labels[:, given:] = ids[:, :-1].masked_fill(batch.answer_mask[:, :-1] == 0, IGNORED)
        prompt = context["mask"] if "embeds" in context else mask.new_ones(len(batch), given)
        return Sequences(logits, labels, torch.cat([prompt, mask[:, :-1]], dim=1))

    @torch.no_grad()
    def room(self, probe: Probe) -> int | None:
        """Tokens that fit beside a probe's prompt, text of edits left aside; None: any number."""
        most = positions_of(self.model)
        if most is None:
            return None
        context = self._read(self._part([probe], [self._prompt(probe, "")], [0]))
        # The last token is written and not read: it needs no position.
        return most + 1 - int(context["mask"].sum()) if "embeds" in context else None

    def _prefaces(self, probes: Sequence[Probe]) -> tuple[str, ...]:
        return tuple("".join(i.preface(probe) for i in self.around) for probe in probes)

    def _require_same_prefaces(self, batch: Batch) -> None:
        if batch.prefaces != self._prefaces(batch.probes):
            raise ValueError(
                "this batch was made under other edits, which put other text in front of its "
                "questions: make it where it is used, inside edit.applied(...)"
            )

    def _prompt(self, probe: Probe, preface: str) -> str:
        kind = "caption" if not probe.question else "text" if probe.image is None else "question"
        if kind == "caption" and probe.image is None:
            raise ValueError("a probe without a question must have an image to be captioned")
        if kind not in self.templates:
            self.backbone.text_prompts(self.tokenizer, [probe.question])  # says why it has none
        prompt = self.templates[kind].replace("{question}", probe.question)
        return self.backbone.prefaced(prompt, preface) if preface else prompt

    def _part(self, probes: Sequence[Probe], prompts: Sequence[str], rows: Sequence[int]) -> Part:
        texts = [prompts[i] for i in rows]
        images = [image for i in rows if (image := probes[i].image) is not None]
        if images:
            seen = self.pixels(images)
            pixels, first = seen["pixel_values"], tuple(map(images.index, images))
            tokens = self.backbone.prompts(self.tokenizer, texts, sizes=seen.get("image_sizes"))
        else:
            tokens, pixels = self.backbone.text_prompts(self.tokenizer, texts), None
            first = None
        tokens = {name: value.to(self.device) for name, value in tokens.items()}
        return Part(torch.tensor(rows, device=self.device), tokens, pixels, first)

    def _read(self, part: Part, target_mask: Tensor | None = None) -> dict[str, Tensor]:
        """The context of a part's prompts, which must leave room for their targets."""
        with self.backbone.each_once(part.images):
            context = self.backbone.read(self.model, part.pixels, **part.prompts)
        mask = None if target_mask is None else target_mask[part.rows]
        require_room(self.model, context, mask, self.name)
        return context

    def _logits(self, weights: Mapping[str, Tensor] | None, batch: Batch) -> Tensor:
        def compute() -> list[Tensor]:
            if (passed := self._packer.scored(batch, self._read)) is not None:
                return [passed.scores]
            found = []
            for part in batch.parts:
                ids, mask = batch.target_ids[part.rows], batch.target_mask[part.rows]
                targets = batch.target_ids, batch.target_mask
                with passing(part.prefix, "scores", [part], targets):
                    context = self._read(part, batch.target_mask)
                    found.append(self.backbone.continued(self.model, context, ids, mask))
            return found

        found = self._swapping.computed(compute, weights)
        if len(found) == 1:
            return found[0]
        return torch.cat(found)[torch.cat([part.rows for part in batch.parts]).argsort()]

    def _written(
        self, weights: Mapping[str, Tensor] | None, batch: Batch, decoding: Decoding
    ) -> list[str]:
        def compute() -> Tensor | list[Tensor]:
            if (passed := self._packer.prompted(batch, self._read, decoding)) is not None:
                return passed.written(decoding)
            found = []
            for part in batch.parts:
                kind = f"written {decoding.beams} {decoding.cache}"
                with passing(part.prefix, kind, [part]):
                    context = self._read(part)
                    found.append(self.backbone.written(self.model, context, decoding))
            return found

        ids = self._swapping.computed(compute, weights)
        if isinstance(ids, Tensor):
            return texts_of(self.tokenizer, ids, self.backbone.ends)
        answers = [""] * len(batch)
        for part, own in zip(batch.parts, ids, strict=True):
            texts = texts_of(self.tokenizer, own, self.backbone.ends)
            for row, text in zip(part.rows.tolist(), texts, strict=True):
                answers[row] = text
        return answers


def _most(batch: Batch, max_tokens: int | None) -> int:
    return max(WRITTEN, batch.target_ids.shape[1]) if max_tokens is None else max_tokens


def _templates(own: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    for name, template in given.items():
        if name not in own:
            raise ValueError(f"no template {name!r}; this model has {', '.join(own)}")
        if name != "caption" and "{question}" not in template:
            raise ValueError(f"template {name!r} must hold {{question}}, got {template!r}")
    return {**own, **given}
