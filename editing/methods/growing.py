"""Editors whose edits are memories inside the model, to which later edits are added."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from editing.edits import Edit, joined
from editing.inside import InsideEdit
from editing.methods.base import Editor

if TYPE_CHECKING:
    import torch

    from editing.mllm import MLLM
    from editing.requests import EditRequest


class GrowingEditor(Editor):
    """Adds requests to a memory, an empty one at first."""

    _before: InsideEdit | None = None

    @abstractmethod
    def empty(self, mllm: MLLM) -> InsideEdit:
        """A memory without facts."""

    @abstractmethod
    def grown(
        self,
        mllm: MLLM,
        edit: InsideEdit,
        requests: Sequence[EditRequest],
        generator: torch.Generator,
    ) -> InsideEdit:
        """Another memory: `edit`, as `empty` makes it or as it has become, with these requests."""

    def make(self, mllm: MLLM, requests: Sequence[EditRequest], generator: torch.Generator) -> Edit:
        before = self.empty(mllm) if self._before is None else self._before
        return self.grown(mllm, before, requests, generator)

    def extend(
        self,
        mllm: MLLM,
        edit: Edit,
        requests: Sequence[EditRequest],
        generator: torch.Generator | None = None,
    ) -> Edit:
        """The same memory with more facts; one of another kind or place is stacked upon."""
        if not self.empty(mllm).joins(edit) or not isinstance(edit, InsideEdit):
            return super().extend(mllm, edit, requests, generator)
        onto = type(self)(self.settings)
        onto._before = edit
        new = onto.edit(mllm, requests, generator)
        new.about = joined(edit.about, new.about)
        return new
