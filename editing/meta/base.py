"""What every editor that must be trained first is: its network, its losses, its file.

A folder of a trained editor holds editor.json (which editor, its settings, which model it was
trained for, how) and network.safetensors. Nothing in it is executed.
"""

from __future__ import annotations

import dataclasses
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from pydantic import TypeAdapter

from editing.edits import unedited
from editing.fingerprints import Fingerprint
from editing.methods.base import Editor
from editing.regions import parameters_of
from mmtune.runs import write_folder, write_json, write_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from editing.edits import Edit
    from editing.mllm import MLLM
    from editing.requests import EditRecord, EditRequest

FORMAT = 1  # of the folders that `save_trained` writes
EDITOR, NETWORK = "editor.json", "network.safetensors"


class TrainedError(ValueError):
    """A trained editor that is missing, damaged, or of another kind or model."""


@dataclass(frozen=True)
class TrainedOptions:
    """Settings of every editor that is trained first.

    Attributes:
        trained: a folder that `mmtune edit-train` wrote, or zoo:MODEL/EDITOR for one that ships;
            every setting that it names is taken from there. Empty only while the editor is being
            trained.
        seed: of what is drawn where no generator is given.
    """

    trained: str = ""
    seed: int = 0


class TrainedEditor(Editor):
    """An editor whose edits come out of a network that was trained on other edits.

    A subclass says how the network begins, what is lost with it, and what it makes of requests. It
    keeps no state of its own: everything that is learnt or counted is in the network.

    Attributes:
        free: settings that may be chosen anew when a trained editor is used.
    """

    free: ClassVar[tuple[str, ...]] = ("trained", "seed")

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._networks: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
        if self.settings.trained:
            self.settings = self._settled(read_head(self.settings.trained))

    @abstractmethod
    def begin(self, mllm: MLLM, generator: torch.Generator) -> nn.Module:
        """A fresh network for this model: parameters are trained, buffers hold statistics.

        Args:
            mllm: the model; it is not changed.
            generator: of the draw, on the CPU.

        Returns:
            The network in float32, on the CPU; whoever uses it moves it.
        """

    @abstractmethod
    def losses(
        self,
        mllm: MLLM,
        network: nn.Module,
        records: Sequence[EditRecord],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """What is lost with this network on a few records: scalars, differentiable and weighted.

        Their sum is minimised. What records lack has no loss: `edit`, `text_generality`,
        `image_generality` (-log p of the target after the edit), `text_locality` and
        `image_locality` (KL from the unedited answer's distributions, nats), or names of its own.

        Args:
            mllm: the model, unedited.
            network: as `begin` makes it, on the model's device; in training mode its buffers may
                take in what is seen.
            records: of one step.
            generator: for what is drawn.
        """

    @abstractmethod
    def edit_with(
        self,
        mllm: MLLM,
        network: nn.Module,
        requests: Sequence[EditRequest],
        generator: torch.Generator,
    ) -> Edit:
        """The edit that this network, in eval mode, makes of requests; see `Editor.edit`."""

    def successes(
        self,
        mllm: MLLM,
        network: nn.Module,
        records: Sequence[EditRecord],
        generator: torch.Generator,
    ) -> int:
        """How many requests an edit made of all of them answers: the target, written greedily."""
        from editing.meta.losses import hits

        requests = [record.request for record in records]
        with self.edit_with(mllm, network, requests, generator).applied(mllm, strict=False):
            batch = mllm.batch(requests)
            return hits(batch, mllm.answer_logits(batch))

    def groups(self, network: nn.Module) -> list[dict[str, Any]]:
        """What is trained, as the groups of torch's optimisers; one may set its own `lr`."""
        return [{"params": [p for p in network.parameters() if p.requires_grad]}]

    def weights(self, mllm: MLLM) -> Mapping[str, Tensor]:
        """The parameters by which a trained editor knows its model: those of its region."""
        return parameters_of(mllm.backbone, self.settings.region)

    def make(self, mllm: MLLM, requests: Sequence[EditRequest], generator: torch.Generator) -> Edit:
        return self.edit_with(mllm, self.network(mllm), requests, generator)

    def network(self, mllm: MLLM) -> nn.Module:
        """The trained network for this model, in eval mode, on its device; read once.

        Raises:
            TrainedError: the editor was not trained, or for another model.
        """
        if mllm.model not in self._networks:
            self._networks[mllm.model] = self._read(mllm)
        return self._networks[mllm.model].to(mllm.device)

    def save_trained(
        self,
        folder: str | Path,
        network: nn.Module,
        mllm: MLLM,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the trained editor, whole or not at all; `about` says how it was trained."""
        head = {
            "format": FORMAT,
            "editor": self.name,
            "settings": asdict(replace(self.settings, trained="")),
            "model": mllm.name,
            "made_on": self._fingerprint(mllm).json(),
            "about": dict(about or {}),
        }
        tensors = {n: t.detach().cpu().contiguous() for n, t in network.state_dict().items()}

        def fill(to: Path) -> None:
            write_tensors(to / NETWORK, tensors, {})
            write_json(to / EDITOR, head)

        write_folder(Path(folder), fill)

    def _read(self, mllm: MLLM) -> nn.Module:
        import torch
        from safetensors.torch import load_file

        if not self.settings.trained:
            raise TrainedError(
                f"{self.name} must be trained before it edits: `mmtune edit-train CONFIG` writes a "
                "folder trained/, which the editor's option `trained` names"
            )
        folder = folder_of(self.settings.trained)
        head = read_head(folder)
        made_on = Fingerprint.read(head["made_on"])
        here = Fingerprint.of(mllm.model, unedited(mllm.model, list(self.weights(mllm))))
        if set(made_on.weights) != set(here.weights):
            differences = ["its region has other parameters"]
        else:
            differences = list(made_on.differences(here))
        if differences:
            raise TrainedError(
                f"{folder} was trained for {head['model']}, and {mllm.name} is another model: "
                f"{'; '.join(differences)}. Load that model, with the same dtype, or train the "
                "editor for this one."
            )
        network = self.begin(mllm, torch.Generator().manual_seed(0))
        try:
            network.load_state_dict(load_file(folder / NETWORK))
        except Exception as error:  # safetensors and torch raise their own
            raise TrainedError(
                f"{folder / NETWORK} does not hold the network of {self.name}: {error}"
            ) from None
        return network.eval().requires_grad_(False)

    def _fingerprint(self, mllm: MLLM) -> Fingerprint:
        return Fingerprint.of(mllm.model, unedited(mllm.model, list(self.weights(mllm))))

    def _settled(self, head: Mapping[str, Any]) -> Any:
        """The settings it was trained with; those given must be the same, or free, or defaults."""
        folder, given = self.settings.trained, self.settings
        if head["editor"] != self.name:
            raise TrainedError(
                f"{folder} holds a trained {head['editor']}, and {self.name} was asked for"
            )
        names = {field.name for field in dataclasses.fields(self.options)}
        try:
            if unknown := set(head["settings"]) - names:
                raise ValueError(f"unknown {', '.join(sorted(unknown))}")
            trained: Any = TypeAdapter(self.options).validate_python(head["settings"])
        except ValueError as error:  # pydantic's is one
            raise TrainedError(
                f"{Path(folder) / EDITOR} has settings that {self.name} does not have here: {error}"
            ) from None
        default = self.options()
        for name in names.difference(self.free):
            want, had = getattr(given, name), getattr(trained, name)
            if want not in (had, getattr(default, name)):
                raise TrainedError(
                    f"{self.name} was trained with {name} = {had!r} ({folder}), got {want!r}: "
                    f"leave {name} out, or train with it"
                )
        return replace(trained, **{name: getattr(given, name) for name in self.free})


def folder_of(trained: str | Path) -> Path:
    """Where a trained editor is. Raises TrainedError: the zoo has no such editor."""
    from mmtune import zoo

    scheme, _, name = str(trained).partition(":")
    if scheme != "zoo":
        return Path(trained)
    try:
        return zoo.editor_path(name)
    except zoo.ZooError as error:
        raise TrainedError(str(error)) from None


def read_head(folder: str | Path) -> dict[str, Any]:
    """What editor.json says: editor, settings, model, made_on, about.

    Raises:
        TrainedError: no trained editor there, a damaged one, or one of another format.
    """
    path = folder_of(folder) / EDITOR
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
        format_ = head["format"]
        head = {key: head[key] for key in ("editor", "settings", "model", "made_on", "about")}
        Fingerprint.read(head["made_on"])
    except FileNotFoundError:
        raise TrainedError(
            f"{folder} holds no trained editor: there is no {EDITOR} in it. `mmtune edit-train` "
            "writes one, as runs/NAME/trained"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TrainedError(f"{path} cannot be read: {error!r}") from None
    if format_ != FORMAT:
        raise TrainedError(f"{folder} has format {format_!r}, and this version reads {FORMAT}")
    return head
