"""Edits that change parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from editing.changes import Change, change_of
from editing.edits import Applied, Edit, EditError, joined, unedited
from editing.fingerprints import Fingerprint, named

if TYPE_CHECKING:
    from torch import Tensor, nn

    from editing.mllm import MLLM


class WeightEdit(Edit):
    """A change of parameters.

    Attributes:
        changes: parameter name -> its change.
        made_on: the model that they were made on, unedited.
    """

    kind: ClassVar[str] = "weights"

    def __init__(
        self,
        changes: Mapping[str, Change],
        made_on: Fingerprint,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(about)
        self.changes, self.made_on = dict(changes), made_on

    @classmethod
    def of(
        cls, mllm: MLLM, changes: Mapping[str, Change], about: Mapping[str, Any] | None = None
    ) -> WeightEdit:
        """An edit made on this model.

        Edits that are applied now do not count as a part of the model: the new one can be told to
        be of it with or without them.

        Raises:
            EditError: a parameter that is not there or has another shape; values that are not
                finite.
        """
        endless = [
            name
            for name, change in changes.items()
            if not all(bool(t.isfinite().all()) for t in change.tensors().values())
        ]
        for problem in named("would get values that are not finite", endless):
            raise EditError(f"{problem}: the edit diverged; lower its learning rate")
        _parameters(mllm, changes)
        made_on = Fingerprint.of(mllm.model, unedited(mllm.model, list(changes)))
        return cls(changes, made_on, about)

    def put(self, mllm: MLLM, strict: bool) -> Applied:
        parameters = _parameters(mllm, self.changes)
        if strict:
            here = Fingerprint.of(mllm.model, unedited(mllm.model, list(self.changes)))
            if differences := list(self.made_on.differences(here)):
                raise EditError(
                    f"{mllm.name} is not the model that this edit was made on: "
                    f"{'; '.join(differences)}. Load that model, with the same dtype, or pass "
                    "strict=False where it is meant to be applied to this one."
                )
        with torch.no_grad():
            edited = {n: change.on(parameters[n].data) for n, change in self.changes.items()}
        originals = {name: parameter.data for name, parameter in parameters.items()}

        # The original storage is put aside, never written to: its bits cannot change.
        def undo() -> None:
            for name, parameter in parameters.items():
                parameter.data = originals[name]

        for name, parameter in parameters.items():
            parameter.data = edited[name]
        return Applied(self, undo, originals)

    def then(self, later: Edit) -> Edit:
        """The sum of both changes; `later` may be about other parameters too."""
        if not isinstance(later, WeightEdit):
            return super().then(later)
        changes = dict(self.changes)
        for name, change in later.changes.items():
            changes[name] = changes[name].then(change) if name in changes else change
        weights = {**self.made_on.weights, **later.made_on.weights}
        # `made_on` is of the unedited model in both, so one parameter has one fingerprint.
        return WeightEdit(
            changes, replace(self.made_on, weights=weights), joined(self.about, later.about)
        )

    def settings(self) -> dict[str, Any]:
        forms = {name: change.form for name, change in self.changes.items()}
        return {"changes": forms, "made_on": self.made_on.json()}

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}/{part}": tensor
            for name, change in self.changes.items()
            for part, tensor in change.tensors().items()
        }

    @classmethod
    def restored(
        cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], about: Mapping[str, Any]
    ) -> WeightEdit:
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in settings["changes"]}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("/")
            parts[name][part] = tensor
        changes = {name: change_of(form, parts[name]) for name, form in settings["changes"].items()}
        made_on = Fingerprint.read(settings["made_on"])
        if set(made_on.weights) != set(changes):
            raise ValueError("made_on and changes name different parameters")
        return cls(changes, made_on, about)


def _parameters(mllm: MLLM, changes: Mapping[str, Change]) -> dict[str, nn.Parameter]:
    """The parameters to change. Raises EditError where one is missing or has another shape."""
    present = dict(mllm.model.named_parameters(remove_duplicate=False))
    missing = [name for name in changes if name not in present]
    unlike = [
        f"{name} ({list(present[name].shape)}, expected {list(change.shape())})"
        for name, change in changes.items()
        if name in present and present[name].shape != change.shape()
    ]
    problems = [*named("is no parameter of it", missing), *named("has another shape", unlike)]
    if problems:
        raise EditError(
            f"{mllm.name} ({type(mllm.model).__name__}) is not the kind of model that this edit "
            f"changes: {'; '.join(problems)}"
        )
    return {name: present[name] for name in changes}
