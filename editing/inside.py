"""Memories that act inside one module of the model: what hooks need to know of what is asked.

A hook sees hidden states and no questions. So a memory of this kind is an interceptor as well: it
takes a batch apart into its parts (rows of one part are computed together, see `editing.batches`),
says which of them is on its way, and decides about each question once, at its prompt; the tokens
that are written afterwards go where the question went.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from editing.batches import Batch, Interceptor, Sequences
from editing.edits import Edit, EditError, MemoryEdit, Undo, intercept, unedited
from editing.fingerprints import Fingerprint
from mmtune.backbones.base import SiteError

if TYPE_CHECKING:
    from editing.mllm import MLLM
    from mmtune.backbones.base import Site
    from mmtune.backbones.generation import Decoding


@dataclass
class Passing:
    """Questions of one part of a batch, on their way through the model.

    Attributes:
        batch: the questions, which all have an image or all have none.
        rows: [k] their numbers in the batch that was asked.
        behind: tokens of their answers that are read behind the prompts: all but the last where
            answers are scored, none where they are written.
        route: what the memory decided about them.
        prompt: columns of the prompts, known from the first pass on.
    """

    batch: Batch
    rows: Tensor
    behind: int
    route: Any = None
    prompt: int | None = None

    def columns(self, length: int) -> int:
        """How many of the `length` tokens that pass now are the prompts'; asked once a pass.

        Prompts end together, and answers follow: the last of these columns is where the first
        token of each answer is predicted. An encoder-decoder's decoder has one, its begin token.
        """
        if self.prompt is None:
            self.prompt = length - self.behind
            return self.prompt
        # One token at a time goes on from a cache; without a cache everything is read again.
        return 0 if length == 1 else self.prompt

    def places(self, count: int) -> list[int]:
        """For each question, which of the `count` rows that pass now is its own.

        What sees images may see one once that several questions are about. Raises EditError where
        rows are neither questions nor images.
        """
        images = self.batch.parts[0].images or tuple(range(len(self.batch)))
        distinct = list(dict.fromkeys(images))
        if count == len(images):
            return list(range(count))
        if count != len(distinct):
            raise EditError(
                f"{len(images)} questions about {len(distinct)} images pass as {count} rows: a "
                "memory cannot tell which are whose there; choose another place"
            )
        return [distinct.index(image) for image in images]

    def tokens(self, columns: int, causal: bool) -> Tensor:
        """[k, columns] bool, whether a column of a prompt holds a token, not padding.

        Args:
            columns: of the prompts.
            causal: False in an encoder-decoder.
        """
        mask = self.batch.parts[0].prompts["attention_mask"].bool()
        found = mask.new_ones(len(mask), columns)
        if causal:  # an image's tokens may stand in front of the words
            found[:, columns - mask.shape[1] :] = mask
        return found


class Acting:
    """What a memory does in one model, while it is in place there."""

    def decide(self, passing: Passing) -> None:
        """Decide about the questions before the model reads them; sets `passing.route`."""

    def output(self, passing: Passing, x: Tensor, y: Tensor) -> Tensor | None:
        """What the module is to give instead of y; None leaves it as it is.

        Args:
            passing: what is on its way.
            x: [k, s, c] the module's input.
            y: [k, s, d] its output, which must not be written to.
        """
        raise NotImplementedError


class Inside(Interceptor):
    """One memory in one model: a hook on its module, told what passes there.

    Args:
        mllm: the model.
        path: of the module.
        acting: what is done there.
    """

    def __init__(self, mllm: MLLM, path: str, acting: Acting) -> None:
        self.mllm, self.acting = mllm, acting
        self.passing: Passing | None = None
        self._module = mllm.model.get_submodule(path)

    def put(self) -> Undo:
        """Hook the module; returns what removes the hook."""
        away = intercept(self.mllm, self)
        hook = self._module.register_forward_hook(self._hook)

        def undo() -> None:
            hook.remove()
            away()

        return undo

    def logits(self, batch: Batch, inner: Callable[[Batch], Tensor]) -> Tensor:
        found, order = [], []
        for rows, part in parts_of(batch):
            order.append(rows)
            with self._asked(part, rows, part.target_ids.shape[1] - 1):
                found.append(inner(part))
        return found[0] if len(found) == 1 else torch.cat(found)[torch.cat(order).argsort()]

    def written(
        self, batch: Batch, decoding: Decoding, inner: Callable[[Batch, Decoding], list[str]]
    ) -> list[str]:
        answers = [""] * len(batch)
        for rows, part in parts_of(batch):
            with self._asked(part, rows, 0):
                said = inner(part, decoding)
            for row, text in zip(rows.tolist(), said, strict=True):
                answers[row] = text
        return answers

    def sequences(self, batch: Batch, inner: Callable[[Batch], Sequences]) -> Sequences:
        with self._asked(batch, batch.parts[0].rows, batch.target_ids.shape[1] - 1):
            return inner(batch)

    @contextmanager
    def _asked(self, part: Batch, rows: Tensor, behind: int) -> Iterator[None]:
        passing = Passing(part, rows, behind)
        self.acting.decide(passing)
        self.passing = passing
        try:
            yield
        finally:
            self.passing = None

    def _hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.passing is None:
            return None
        first = output[0] if isinstance(output, tuple) else output
        # OPT's MLP reads the tokens of all rows in one line.
        rows = len(first) if first.dim() == 3 else len(self.passing.batch)
        x, y = (t.reshape(rows, -1, t.shape[-1]) for t in (args[0], first))
        new = self.acting.output(self.passing, x, y)
        if new is None:
            return None
        new = new.view_as(first)
        return (new, *output[1:]) if isinstance(output, tuple) else new


class InsideEdit(MemoryEdit):
    """A memory whose facts act in one module.

    Attributes:
        path: of the module in the stock model.
        made_on: the model; its weight is one of the module's, or the module's only one.
    """

    def __init__(
        self, path: str, made_on: Fingerprint, about: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(about)
        self.path, self.made_on = path, made_on

    @abstractmethod
    def acting(self, mllm: MLLM) -> Acting:
        """What acts in this model, on its device. Raises EditError: it does not fit in there."""

    def put(self, mllm: MLLM, strict: bool) -> Undo:
        try:
            here = fingerprint(mllm, next(iter(self.made_on.weights)))
        except AttributeError:
            raise EditError(
                f"{mllm.name} ({type(mllm.model).__name__}) is not the kind of model that this "
                f"edit acts in: it has no {self.path}"
            ) from None
        if strict and (differences := list(self.made_on.differences(here))):
            raise EditError(
                f"{mllm.name} is not the model that this edit was made on: "
                f"{'; '.join(differences)}. Load that model, with the same dtype, or pass "
                "strict=False where it is meant to be applied to this one."
            )
        return Inside(mllm, self.path, self.acting(mllm)).put()

    def joins(self, later: Edit) -> bool:
        """Whether `later` is of this kind and acts in the same place of the same model."""
        if not isinstance(later, InsideEdit) or later.kind != self.kind:
            return False
        return (later.path, later.made_on) == (self.path, self.made_on)

    def fits(self, mllm: MLLM, what: str, width: int, expected: int) -> None:
        """Raises EditError where `width` is not as `expected`."""
        if width != expected:
            raise EditError(
                f"{self.path} of {mllm.name} has {what} of width {expected}, and this edit was "
                f"made where it is {width}"
            )


def parts_of(batch: Batch) -> Iterator[tuple[Tensor, Batch]]:
    """The rows of each part of a batch, and the part as a batch of its own, no token shorter.

    What a model computes for a part does not depend on whether it is alone.
    """
    if len(batch.parts) == 1:
        yield batch.parts[0].rows, batch
        return
    for part in batch.parts:
        rows = part.rows.tolist()
        yield (
            part.rows,
            replace(
                batch,
                probes=tuple(batch.probes[i] for i in rows),
                prefaces=tuple(batch.prefaces[i] for i in rows),
                parts=(replace(part, rows=torch.arange(len(rows), device=part.rows.device)),),
                target_ids=batch.target_ids[part.rows],
                target_mask=batch.target_mask[part.rows],
            ),
        )


@contextmanager
def acting_in(mllm: MLLM, path: str, acting: Acting) -> Iterator[None]:
    """Hook a module for a while, as an edit does that is applied."""
    undo = Inside(mllm, path, acting).put()
    try:
        yield
    finally:
        undo()


@contextmanager
def asleep(mllm: MLLM) -> Iterator[None]:
    """No memory acts inside the model; what passes meanwhile is none of the questions asked."""
    insides = [i for i in mllm.around if isinstance(i, Inside)]
    passing = [i.passing for i in insides]
    for inside in insides:
        inside.passing = None
    try:
        yield
    finally:
        for inside, earlier in zip(insides, passing, strict=True):
            inside.passing = earlier


def fingerprint(mllm: MLLM, name: str) -> Fingerprint:
    """The unedited model, as an edit in the place of this parameter knows it."""
    return Fingerprint.of(mllm.model, unedited(mllm.model, [name]))


def language_site(mllm: MLLM, role: str, layer: int | None, depth: float) -> Site:
    """Where in the language model a memory acts.

    Args:
        mllm: the model.
        role: of the site.
        layer: its number, counted from the input, negative from the end; None takes `depth`.
        depth: in [0, 1], of the layers that write: an encoder-decoder's are its decoder's.

    Raises:
        SiteError: no such layer, or one of an encoder, which no answer passes through.
    """
    sites = mllm.backbone.select(["language"], [role])
    trunk = mllm.backbone.trunks()["language"]
    writing = [s for s in sites if trunk.causal or not s.path.startswith(f"{trunk.path}.")]
    if layer is None:
        return writing[int(depth * (len(writing) - 1))]
    (site,) = mllm.backbone.select(["language"], [role], [layer])
    if site not in writing:
        raise SiteError(
            f"layer {layer} of {mllm.name} is its encoder's, through which answers do not pass: "
            f"choose one of {writing[0].layer}..{writing[-1].layer}"
        )
    return site
