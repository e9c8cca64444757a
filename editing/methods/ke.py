"""KE: a trained network that has read the edit gates the gradient and adds a matrix of rank one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from editing.batches import probe_of
from editing.changes import Change, LowRank
from editing.features import features_of
from editing.meta.gradients import Rows, gradient_rows
from editing.meta.weights import TrainedWeightEditor, TrainedWeightOptions
from editing.ranges import Count, NotNegative, Positive

if TYPE_CHECKING:
    from editing.mllm import MLLM
    from editing.requests import EditRequest


@dataclass(frozen=True)
class KeOptions(TrainedWeightOptions):
    """Settings of KE.

    Attributes:
        encoder: width of each direction of the LSTM.
        condition: width of what is known of an edit.
        hidden: width of each weight's own layer.
        scale: no gate is wider open than this. A softmax over n outputs leaves 1 / n of the
            gradient on average, so that a scale far below n lets next to nothing through.
        start: untrained it is a step of this length down the gradient; 0 begins at random, as the
            released code does.
    """

    encoder: Count = 256
    condition: Count = 768
    hidden: Count = 512
    scale: Positive = 1.0
    start: NotNegative = 0.0


@dataclass(frozen=True)
class Read:
    """An edit as the network reads it.

    Attributes:
        words: [t, d] the model's embeddings of the question's tokens, then of the target's.
        asked: how many of them are the question's.
        image: [d] mean of its tokens, zero where there is none.
    """

    words: Tensor
    asked: int
    image: Tensor


class Encoder(nn.Module):
    """[c]: tanh of a linear map of an LSTM's two last states and of the image."""

    def __init__(self, width: int, settings: KeOptions) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, settings.encoder, bidirectional=True, batch_first=True)
        self.target = nn.Parameter(torch.zeros(width))  # marks the target's tokens
        self.words = nn.Linear(2 * settings.encoder, settings.condition)
        self.image = nn.Linear(width, settings.condition, bias=False)

    def forward(self, read: Read) -> Tensor:
        # Language models' embeddings are small; unscaled, all edits would be read as nearly one.
        words, image = (
            nn.functional.layer_norm(part.to(self.target), part.shape[-1:])
            for part in (read.words, read.image)
        )
        marked = torch.cat([words[: read.asked], words[read.asked :] + self.target])
        _, (last, _) = self.lstm(marked[None])
        return torch.tanh(self.words(last.flatten()) + self.image(image))


class Gate(nn.Module):
    """sigmoid(eta) * (G * softmax(a) g^T + softmax(b) e^T), of one weight, as two factors.

    G = delta^T x is the gradient. A product by elements with a matrix of rank one leaves a sum of
    outer products what it is, so that the update is never made dense.

    Args:
        shape: [out, in] of the weight.
        settings: see `KeOptions`.

    Shape: a, b [out]; g, e [in]; eta [].
    """

    def __init__(self, shape: Sequence[int], settings: KeOptions) -> None:
        super().__init__()
        outputs, inputs = shape
        self.sizes, self.scale = (outputs, inputs, outputs, inputs, 1), settings.scale
        self.layers = nn.Sequential(
            weight_norm(nn.Linear(settings.condition, settings.hidden)),
            nn.Tanh(),
            weight_norm(nn.Linear(settings.hidden, sum(self.sizes))),
        )
        if settings.start:
            self._descend(settings.start)

    @torch.no_grad()
    def _descend(self, rate: float) -> None:
        """Begin with g = -2 rate out / scale, e = 0 and even a and b, whatever the edit is."""
        outputs = self.sizes[0]
        last: Any = self.layers[-1]
        lengths = last.parametrizations.weight.original0  # of the rows; zero lengths can grow
        lengths.zero_()
        last.bias.zero_()
        last.bias.split(self.sizes)[1].fill_(-2 * rate * outputs / self.scale)

    def forward(self, condition: Tensor, x: Tensor, delta: Tensor) -> LowRank:
        """From [c], [n, in] and [n, out]."""
        a, g, b, e, eta = self.layers(condition).split(self.sizes)
        left = torch.cat([(delta * a.softmax(0)).T, b.softmax(0)[:, None]], dim=1)
        return LowRank(self.scale * eta.sigmoid() * left, torch.cat([x * g, e[None]]))


class KeNetwork(nn.Module):
    """One encoder, and a `Gate` for each weight.

    Args:
        width: d of the model's embeddings.
        shapes: weight -> [out, in].
        settings: see `KeOptions`.
        generator: of the draw.
    """

    def __init__(
        self,
        width: int,
        shapes: Mapping[str, tuple[int, ...]],
        settings: KeOptions,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.names = list(shapes)
        seed = int(torch.randint(2**31, (), generator=generator))
        # torch's layers draw from the global generator alone: lend it to them.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.encoder = Encoder(width, settings)
            self.gates = nn.ModuleList(Gate(shape, settings) for shape in shapes.values())

    def forward(self, read: Read, rows: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, LowRank]:
        """The change of each weight from its rows, [n, in] and [n, out]."""
        condition = self.encoder(read)
        return {
            name: gate(condition, *(part.to(condition) for part in rows[name]))
            for name, gate in zip(self.names, self.gates, strict=True)
        }


class Ke(TrainedWeightEditor):
    """A gated gradient and a matrix of rank one, by a network that has read the edit (see `Gate`).

        W <- W + scale sigmoid(eta) (G * softmax(a) g^T + softmax(b) e^T),    G the gradient

    Numbers changed: all of the region's matrices, by a change of rank 1 + tokens for each request.

    Differs from the released code: the encoder reads the question and the target as the model's
    own frozen embeddings, scaled to unit variance, and the image, where theirs embeds "old answer
    >> target || question" and sees no image; training minimises the losses of
    `editing.meta.losses`, where theirs bounds the KL by a Lagrange multiplier; several requests are
    gated one by one and add up, where theirs are one gradient under one gate.
    """

    name: ClassVar[str] = "ke"
    summary: ClassVar[str] = "a trained network gates the gradient and adds a matrix of rank one"
    source: ClassVar[str] = "KnowledgeEditor (De Cao et al.), arXiv 2104.08164"
    options: ClassVar[type] = KeOptions

    def begin(self, mllm: MLLM, generator: torch.Generator) -> nn.Module:
        shapes = {name: tuple(weight.shape) for name, weight in self.weights(mllm).items()}
        width = _embedding(mllm).weight.shape[1]
        return KeNetwork(width, shapes, self.settings, generator)

    def change(
        self, mllm: MLLM, network: nn.Module, request: EditRequest, rows: Mapping[str, Rows]
    ) -> dict[str, LowRank]:
        return network(_read(mllm, request), rows)

    def changes(
        self, mllm: MLLM, network: nn.Module, requests: Sequence[EditRequest]
    ) -> dict[str, Change]:
        found: dict[str, Change] = {}
        weights = self.weights(mllm)
        for request in requests:
            rows = gradient_rows(mllm, weights, [request])
            for name, change in self.change(mllm, network, request, rows).items():
                found[name] = found[name].then(change) if name in found else change
        return found


def _embedding(mllm: MLLM) -> Any:
    stock: Any = mllm.model
    return stock.get_input_embeddings()


@torch.no_grad()
def _read(mllm: MLLM, request: EditRequest) -> Read:
    probe = probe_of(request)
    asked, said = (
        mllm.tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (probe.question, probe.answer)
    )
    ids = torch.tensor([*asked, *said], device=mllm.device)
    return Read(_embedding(mllm)(ids), len(asked), features_of(mllm, [request]).image[0])


EDITORS = (Ke,)
