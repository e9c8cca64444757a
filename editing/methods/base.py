"""What every editor is, and the editors that there are: one file each, found by their EDITORS."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from mmtune.suggestions import did_you_mean

if TYPE_CHECKING:
    import torch

    from editing.edits import Edit
    from editing.mllm import MLLM
    from editing.requests import EditRequest


class Editor(ABC):
    """Makes edits; it leaves the model as it is.

    Each call of `edit` stands for itself: what it draws depends on the generator or the seed among
    the options, not on the edits before it.

    Attributes:
        name: of the editor in configs.
        summary: one line.
        source: paper and identifier.
        options: dataclass whose fields are the editor's settings; it has a `seed`.
        settings: an instance of it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    options: ClassVar[type]

    def __init__(self, settings: Any = None) -> None:
        self.settings = self.options() if settings is None else settings

    def edit(
        self,
        mllm: MLLM,
        requests: Sequence[EditRequest],
        generator: torch.Generator | None = None,
    ) -> Edit:
        """The change that makes the model answer every request with its target.

        Args:
            mllm: the model; edits that are applied now stay, and the new one comes on top.
            requests: at least one; all of them are one edit.
            generator: for what is drawn; None makes one from the seed among the options.

        Returns:
            The edit, not applied. Its `about` says what was asked, and how it went.

        Raises:
            ValueError: no request, or one without a target.
        """
        import torch

        from editing.batches import probe_of

        if not requests:
            raise ValueError("expected at least one edit request, got none")
        for request in requests:
            probe_of(request)
        if generator is None:
            generator = torch.Generator().manual_seed(self.settings.seed)
        made = self.make(mllm, requests, generator)
        asked = [{"id": r.id, "question": r.question, "target": r.target} for r in requests]
        made.about = {
            "editor": self.name,
            "settings": asdict(self.settings),
            "requests": asked,
            **made.about,
        }
        return made

    def extend(
        self,
        mllm: MLLM,
        edit: Edit,
        requests: Sequence[EditRequest],
        generator: torch.Generator | None = None,
    ) -> Edit:
        """What `edit`, of this editor and not applied now, becomes with these requests as well.

        It does alone what `edit` and the new change do together: sequential editing goes from one
        to the next and keeps the last. An editor with a memory of its own overrides this.

        Args:
            mllm: the model.
            edit: what came before.
            requests: of the new change.
            generator: see `edit`.
        """
        with edit.applied(mllm):
            new = self.edit(mllm, requests, generator)
        return edit.then(new)

    @abstractmethod
    def make(self, mllm: MLLM, requests: Sequence[EditRequest], generator: torch.Generator) -> Edit:
        """What `edit` returns, before it says who made it of what."""


def modules() -> list[ModuleType]:
    """The modules of `editing.methods` in alphabetical order: each may hold EDITORS."""
    package = importlib.import_module("editing.methods")
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    return [importlib.import_module(f"editing.methods.{name}") for name in names]


@cache
def editors() -> dict[str, type[Editor]]:
    """Every editor by name, in alphabetical order of module."""
    return {cls.name: cls for module in modules() for cls in getattr(module, "EDITORS", ())}


def editor(name: str, settings: Any = None) -> Editor:
    """The editor called `name`. Raises ValueError that lists the editors there are.

    Args:
        name: one of `editors()`.
        settings: an instance of its `options`; None takes the defaults.
    """
    known = editors()
    if name not in known:
        hint = did_you_mean(name, known)
        raise ValueError(f"no editor {name!r}; there are {', '.join(known)}.{hint}")
    return known[name](settings)
