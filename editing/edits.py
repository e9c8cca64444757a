"""The change itself: applied and undone to the bit, saved, loaded, stacked.

    edit = editor.edit(mllm, requests)
    with edit.applied(mllm):
        mllm.answer(probes)

What an edit changes, weights, the text that is read, or how answers come about, is its own affair.
Edits nest; each is undone on the way out, whatever happened inside. A file of an edit is a folder
of edit.json and, where there are tensors, edit.safetensors: nothing in it is executed.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from editing.batches import Interceptor
from mmtune.runs import write_folder, write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from editing.mllm import MLLM
    from editing.requests import Probe

FORMAT = 1  # of the folders that `save` writes
Undo = Callable[[], None]


class EditError(ValueError):
    """An edit that cannot be applied, saved or read; the message says why and what to do."""


@dataclass(eq=False)
class Applied:
    """An edit that is in place, and how to take it out."""

    edit: Edit
    undo: Undo
    originals: Mapping[str, Tensor] = field(default_factory=dict)


# Edits in place on each stock model, in order; two MLLMs may share one.
_APPLIED: WeakKeyDictionary[nn.Module, list[Applied]] = WeakKeyDictionary()
_KINDS: dict[str, type[Edit]] = {}


class Edit(ABC):
    """What an editor returns.

    A subclass names its `kind`, by which `load` finds it (an editor's own kinds live in its module
    in `editing.methods`).

    Attributes:
        kind: in files.
        about: what was edited, by which editor, and how it went; anything JSON holds.
    """

    kind: ClassVar[str]

    def __init__(self, about: Mapping[str, Any] | None = None) -> None:
        self.about = dict(about or {})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        kind = cls.__dict__.get("kind")
        if kind is not None:
            if kind in _KINDS:
                raise TypeError(f"there is an edit of kind {kind!r} already: {_KINDS[kind]}")
            _KINDS[kind] = cls

    @abstractmethod
    def put(self, mllm: MLLM, strict: bool) -> Undo | Applied:
        """Put the change in place, all of it or, with an exception, nothing; returns its undoing.

        Args:
            mllm: the model.
            strict: refuse a model other than the one that the edit was made on.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What a file holds besides tensors, as JSON has it."""

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds as tensors."""
        return {}

    @classmethod
    @abstractmethod
    def restored(
        cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], about: Mapping[str, Any]
    ) -> Edit:
        """The edit whose `settings`, `tensors` and `about` these are.

        Raises:
            TypeError, KeyError, ValueError: they are not.
        """

    def then(self, later: Edit) -> Edit:
        """One edit that does this and then `later`, which was made on top of it.

        Kinds that can be one are (changes of weights add up, memories join); others are stacked.
        """
        return stack([self, later])

    @contextmanager
    def applied(self, mllm: MLLM, strict: bool = True) -> Iterator[MLLM]:
        """The edited model inside; after it every parameter has the bits it had before.

        Args:
            mllm: the model, other edits possibly applied.
            strict: refuse a model other than the one that the edit was made on. Without, its
                parameters must still exist and have the right shapes.

        Raises:
            EditError: another model; the edit is applied to this model already; edits left in
                another order than the reverse of that in which they were applied.
        """
        active = _APPLIED.setdefault(mllm.model, [])
        if any(entry.edit is self for entry in active):
            raise EditError(
                f"this {self.kind} edit is applied to {mllm.name} already; leave its `with` block "
                "first"
            )
        put = self.put(mllm, strict)
        entry = put if isinstance(put, Applied) else Applied(self, put)
        active.append(entry)
        try:
            yield mllm
        finally:
            _take_out(active, entry)

    def save(self, folder: str | Path) -> None:
        """Write the edit as a folder, whole or not at all; an edit that is there is replaced.

        Raises:
            EditError: `folder` exists and holds no edit.
        """
        path = Path(folder)
        if path.exists() and not (path / "edit.json").is_file():
            raise EditError(f"{path} exists and holds no edit, so it is left alone")
        write_folder(path, self.fill)

    def fill(self, folder: Path) -> None:
        """Write the files of `save` into an empty folder."""
        from safetensors.torch import save_file

        if tensors := self.tensors():
            whole = {name: t.detach().cpu().clone() for name, t in tensors.items()}
            save_file({n: t.contiguous() for n, t in whole.items()}, folder / "edit.safetensors")
        head = {"format": FORMAT, "kind": self.kind, "about": self.about}
        write_json(folder / "edit.json", head | {"settings": self.settings()})


def _take_out(active: list[Applied], entry: Applied) -> None:
    if entry not in active:
        return  # taken out with one below it, see here
    early = 0
    while active[-1] is not entry:
        active.pop().undo()
        early += 1
    active.pop().undo()
    if early:
        raise EditError(
            f"a {entry.edit.kind} edit was left while {early} that were applied after it were "
            "still in place. All of them are undone now; leave edits in reverse order."
        )


class ContextEdit(Edit, Interceptor):
    """Text in front of every question; weights untouched, so it can be put on any model.

    Attributes:
        text: what the user says before the question, its separator included.
    """

    kind: ClassVar[str] = "context"

    def __init__(self, text: str, about: Mapping[str, Any] | None = None) -> None:
        super().__init__(about)
        self.text = text

    def put(self, mllm: MLLM, strict: bool) -> Undo:
        return intercept(mllm, self)

    def preface(self, probe: Probe) -> str:
        return self.text

    def settings(self) -> dict[str, Any]:
        return {"text": self.text}

    @classmethod
    def restored(
        cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], about: Mapping[str, Any]
    ) -> ContextEdit:
        return cls(str(settings["text"]), about)


class MemoryEdit(Edit, Interceptor):
    """An edit that keeps facts beside the model and decides at each question whether one applies.

    A subclass overrides `preface`, `logits` and `written` (see `Interceptor`); one that acts inside
    the model hooks its modules in `put` and returns what removes the hooks.
    """

    def put(self, mllm: MLLM, strict: bool) -> Undo:
        return intercept(mllm, self)


class StackedEdit(Edit):
    """Edits applied one after the other, undone in reverse.

    Attributes:
        edits: in order.
    """

    kind: ClassVar[str] = "stack"

    def __init__(self, edits: Sequence[Edit], about: Mapping[str, Any] | None = None) -> None:
        super().__init__(about)
        self.edits = tuple(edits)

    def put(self, mllm: MLLM, strict: bool) -> Undo:
        with ExitStack() as entered:
            for edit in self.edits:
                entered.enter_context(edit.applied(mllm, strict))
            return entered.pop_all().close

    def settings(self) -> dict[str, Any]:
        return {"count": len(self.edits)}

    def fill(self, folder: Path) -> None:
        super().fill(folder)
        for number, edit in enumerate(self.edits):
            part = _part(folder, number)
            part.mkdir()
            edit.fill(part)

    @classmethod
    def restored(
        cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], about: Mapping[str, Any]
    ) -> StackedEdit:
        raise ValueError("a stack is read from its folder, see `load`")


def stack(edits: Sequence[Edit], about: Mapping[str, Any] | None = None) -> StackedEdit:
    """Edits as one that applies them in order. Changes of one parameter add up.

    An edit that was made while others were applied is a change on top of theirs: stack it after
    them.

    Raises:
        EditError: one edit twice.
    """
    if len({id(edit) for edit in edits}) < len(edits):
        raise EditError("one edit cannot be stacked on itself")
    return StackedEdit(edits, about)


def joined(first: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """What is said about two edits that became one: of the later, with the requests of both."""
    requests = [*first.get("requests", ()), *later.get("requests", ())]
    return {**later, "requests": requests} if requests else dict(later)


def load(folder: str | Path) -> Edit:
    """The edit that `Edit.save` wrote.

    Raises:
        EditError: no edit, a damaged one, or one of a kind or format that is not known here.
    """
    from safetensors.torch import load_file

    path = Path(folder)
    try:
        head = json.loads((path / "edit.json").read_text(encoding="utf-8"))
        format_, kind = head["format"], head["kind"]
        settings, about = dict(head["settings"]), dict(head["about"])
    except FileNotFoundError:
        raise EditError(f"{path} holds no edit: there is no edit.json in it") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EditError(f"{path / 'edit.json'} cannot be read: {error!r}") from None
    if format_ != FORMAT:
        raise EditError(f"{path} has format {format_!r}, and this version reads {FORMAT}")
    found = _kind(kind, path)
    try:
        if found is StackedEdit:
            parts = [load(_part(path, number)) for number in range(int(settings["count"]))]
            return StackedEdit(parts, about)
        file = path / "edit.safetensors"
        return found.restored(settings, load_file(file) if file.exists() else {}, about)
    except EditError:
        raise
    except Exception as error:  # safetensors raises its own, and files hold anything
        raise EditError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def intercept(mllm: MLLM, interceptor: Interceptor) -> Undo:
    """Put an interceptor around a model's answers; returns what takes it away."""
    mllm.around.append(interceptor)

    def undo() -> None:
        # By identity: an interceptor may say that it equals another.
        mllm.around[:] = [other for other in mllm.around if other is not interceptor]

    return undo


def unedited(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The parameters' values without the edits that are applied now."""
    found = {}
    for name in names:
        entries = (e.originals for e in _APPLIED.get(model, ()) if name in e.originals)
        first = next(entries, None)
        found[name] = model.get_parameter(name).data if first is None else first[name]
    return found


def applied_to(mllm: MLLM) -> tuple[Edit, ...]:
    """The edits in place on its model now, in the order in which they were applied."""
    return tuple(entry.edit for entry in _APPLIED.get(mllm.model, ()))


@contextmanager
def set_aside(mllm: MLLM) -> Iterator[MLLM]:
    """The unedited model inside: without the weights, texts and answers of the applied edits.

    What an edit has hooked into modules stays.
    """
    entries = _APPLIED.get(mllm.model, ())
    names = list(dict.fromkeys(name for entry in entries for name in entry.originals))
    parameters = {name: mllm.model.get_parameter(name) for name in names}
    edited = {name: parameter.data for name, parameter in parameters.items()}
    originals, around = unedited(mllm.model, names), mllm.around
    mllm.around = []
    try:
        for name, parameter in parameters.items():
            parameter.data = originals[name]
        yield mllm
    finally:
        mllm.around = around
        for name, parameter in parameters.items():
            parameter.data = edited[name]


def _kind(kind: Any, path: Path) -> type[Edit]:
    if isinstance(kind, str) and kind not in _KINDS:
        import editing.weight_edits  # noqa: F401 (which adds its kind, as editors do)
        from editing.methods.base import modules

        modules()
    if not isinstance(kind, str) or kind not in _KINDS:
        raise EditError(
            f"{path} holds an edit of kind {kind!r}; this version knows {', '.join(_KINDS)}"
        )
    return _KINDS[kind]


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}"
