"""A multimodal language model that is asked before an edit, under it, and after it was undone."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING

from mmtune.data.records import MediaRef
from mmtune.ui.problems import PageProblem

if TYPE_CHECKING:
    from torch import nn

    from editing.edits import Edit
    from editing.methods.base import Editor
    from editing.mllm import MLLM
    from editing.requests import Probe

REGIONS = ("language", "vision")
DRAWINGS = (65, 50, 99, 90, 20, 37, 0, 118)  # rows of clipart-animals-test
ASKED = "The question"
REPHRASED = "In other words"
ELSEWHERE = "About the other picture"


@dataclass(frozen=True)
class Questions:
    """What the page asks, before an edit and after it.

    Attributes:
        question: what is edited.
        image: the picture that it is about.
        rephrase: the same in other words; empty where it is not asked.
        other: a picture that the edit is not about; None where it is not asked about.
    """

    question: str
    image: MediaRef | None
    rephrase: str = ""
    other: MediaRef | None = None

    def probes(self) -> dict[str, Probe]:
        """What is asked, by what it is asked for; the question comes first.

        Raises:
            PageProblem: no question or no picture.
        """
        from editing.requests import Probe

        if self.image is None:
            raise PageProblem("Choose a picture, or upload one.")
        if not self.question.strip():
            raise PageProblem("Type a question about the picture.")
        question = self.question.strip()
        found = {ASKED: Probe(question, "", self.image)}
        if self.rephrase.strip():
            found[REPHRASED] = Probe(self.rephrase.strip(), "", self.image)
        if self.other is not None:
            found[ELSEWHERE] = Probe(question, "", self.other)
        return found


@dataclass(frozen=True)
class Held:
    """An edit that was made and is not undone.

    Attributes:
        edit: the edit; it is applied only while questions are asked.
        questions: what was asked.
        target: the new answer.
        editor: the editor's name.
        before: the unedited model's answers, by what is asked.
        after: its answers under the edit.
    """

    edit: Edit
    questions: Questions
    target: str
    editor: str
    before: dict[str, str]
    after: dict[str, str]

    @property
    def took(self) -> bool:
        """Whether the model gives the new answer."""
        return _says(self.after, self.target)


@dataclass(frozen=True)
class Undone:
    """What the model is after an undo.

    Attributes:
        answers: of now.
        same_answers: whether they are those of before the edit.
        same_bits: whether every parameter and buffer has the bits it had before.
        count: how many numbers these are.
    """

    answers: dict[str, str]
    same_answers: bool
    same_bits: bool
    count: int


class Desk:
    """One model at which several visitors edit, each for themselves.

    An edit is applied while its questions are answered and taken out again, so that visitors do not
    see each other's. What is asked together is always computed together: answers of before and
    after differ by the edit alone.

    Attributes:
        mllm: the model, unedited whenever nobody asks.
        editors: those that can be used at once, by name.
    """

    def __init__(self, mllm: MLLM) -> None:
        self.mllm = mllm
        self.editors = editors_at_hand(mllm.name.partition("@")[0])
        self._lock = Lock()
        self._digest, self._count = digest(mllm.model)

    def ask(self, questions: Questions, edit: Edit | None = None) -> dict[str, str]:
        """The answers, by what is asked, of the model or of the model under an edit."""
        probes = questions.probes()
        with self._lock, nullcontext() if edit is None else edit.applied(self.mllm):
            said = self.mllm.answer(list(probes.values()))
        return dict(zip(probes, said, strict=True))

    def edit(
        self, questions: Questions, target: str, editor: str, region: str | None = None
    ) -> Held:
        """Make the model answer the question with `target`, and ask before and after.

        Args:
            questions: what is edited and what is asked besides.
            target: the new answer.
            editor: one of `editors`.
            region: "language" or "vision", for editors that leave it open; None keeps theirs.

        Raises:
            PageProblem: no target, or one that the model says already.
            ValueError: what the editor says it cannot do.
        """
        from editing.requests import EditRequest

        questions.probes()  # what is missing is told in the order of the page
        target = target.strip()
        if not target:
            raise PageProblem("Type the new answer that the model is to give.")
        before = self.ask(questions)
        if _says(before, target):
            raise PageProblem(
                f"The model answers “{before[ASKED]}” already: there is nothing to edit. Type "
                "another answer."
            )
        request = EditRequest(questions.question.strip(), target, questions.image, id="page")
        maker = in_region(self.editors[editor], region)
        with self._lock:
            made = maker.edit(self.mllm, [request])
        return Held(made, questions, target, editor, before, self.ask(questions, made))

    def undo(self, held: Held) -> Undone:
        """Ask again without the edit, and compare answers and bits with those of before."""
        answers = self.ask(held.questions)
        with self._lock:
            now, count = digest(self.mllm.model)
        return Undone(answers, answers == held.before, now == self._digest, count)


def editors_at_hand(name: str) -> dict[str, Editor]:
    """The editors that can be used at once, by name, with their default settings.

    Those that must be trained first are here where the zoo has them trained for this model. Those
    that first count what a model looks up in many texts (ROME, MEMIT, AlphaEdit) are not.
    """
    from editing.closed_form.base import ClosedForm
    from editing.meta.base import TrainedEditor
    from editing.methods.base import editors

    found: dict[str, Editor] = {}
    for cls in sorted(editors().values(), key=lambda cls: (cls.name != "ft", cls.name)):
        if issubclass(cls, ClosedForm):
            continue
        settings = None
        if issubclass(cls, TrainedEditor):
            trained = f"{name}/{cls.name}"
            if not _in_zoo(trained):
                continue
            settings = cls.options(trained=trained)
        found[cls.name] = cls(settings)
    return found


def region_is_open(editor: Editor) -> bool:
    """Whether the editor may be aimed at a region; one that was trained has its own."""
    return hasattr(editor.settings, "region") and not getattr(editor.settings, "trained", "")


def in_region(editor: Editor, region: str | None) -> Editor:
    """The editor aimed at a region, where that is open; else the editor as it is."""
    if region is None or not region_is_open(editor):
        return editor
    return type(editor)(replace(editor.settings, region=region))


def digest(model: nn.Module) -> tuple[str, int]:
    """SHA-256 of all parameters and buffers, bit by bit, and how many numbers they are."""
    import torch

    found, count = hashlib.sha256(), 0
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        flat = tensor.detach().contiguous().flatten()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(flat.view(torch.uint8).cpu().numpy().data)
        count += flat.numel()
    return found.hexdigest(), count


def drawings() -> list[MediaRef]:
    """A few of the zoo's drawings, none of which tiny-llava saw in training."""
    from mmtune.data.options import SourceOptions
    from mmtune.data.readers import read
    from mmtune.data.records import Record

    source = SourceOptions(format="zoo", name="clipart-animals", split="test")
    records = [item for item in read(source, "test") if isinstance(item, Record)]
    return [records[row].image for row in DRAWINGS]


def _says(answers: Mapping[str, str], target: str) -> bool:
    """Whether the question is answered with the target, as evaluation compares answers."""
    from editing.metrics.answers import generated_match

    return generated_match(answers[ASKED], target).total > 0


def _in_zoo(trained: str) -> bool:
    from mmtune import zoo

    scheme, _, name = trained.partition(":")
    try:
        return scheme == "zoo" and zoo.editor_path(name).is_dir()
    except zoo.ZooError:
        return False
