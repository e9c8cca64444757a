"""SERAC's networks: who says that a question is about a cached edit, and what follows the fact.

The scope reads a question's words and its image, never an answer. It is either trained or fixed;
both give [b, n] log similarities, and an edit asked again has similarity 1. The counterfactual
model is the model itself, which reads the edit first, with a trained change of low rank on top.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from editing.features import Features
from editing.methods.mend_transform import RunningStatistics
from editing.methods.serac_scope import log_similarities

APART = 10.0  # distance at which nothing is alike: a similarity of 5e-5
PLAIN = 0.05  # distance of an edit without an image: one about the very image is nearer
FLOOR = 1e-3  # of a feature's standard deviation, as a share of all features' mean
ADAPTER = "adapter."


class Projection(nn.Module):
    """Standardised features of one length, projected: W z sqrt(d) / |z|, z = (x - mean) / std.

    Mean and deviation are those of all features seen in training: states of a language model have
    a few directions that are large and tell nothing. Of one length, what is unlike everything seen
    in training is as near to its like as what is common.

    Args:
        width: d of the features.
        out: w.
        generator: of the draw of W, under which two unlike features are at a squared distance of 2.

    Shape: [n, d] -> [n, w].
    """

    def __init__(self, width: int, out: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.statistics = RunningStatistics(width)
        drawn = torch.randn(out, width, generator=generator)
        self.weight = nn.Parameter(drawn / math.sqrt(out * width))

    def forward(self, features: Tensor) -> Tensor:
        if self.statistics.count < 2:  # nothing is known of them yet
            return features.to(self.weight) @ self.weight.T
        std = self.statistics.std
        std = std.clamp(min=max(FLOOR * float(std.mean()), 1e-12))
        exact = F.normalize((features.to(std) - self.statistics.mean) / std, dim=-1)
        return math.sqrt(exact.shape[-1]) * exact.to(self.weight) @ self.weight.T


class TrainedScope(nn.Module):
    """exp(-|P q - P c|^2), added up over words and image, for each question q and cached edit c.

    Where neither has an image the words decide. Where one alone has one, its absence counts as a
    distance, which is learned.

    Args:
        width: d of the features.
        out: width of the projections.
        generator: of their draw.
    """

    def __init__(self, width: int, out: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.words = Projection(width, out, generator)
        self.image = Projection(width, out, generator)
        # Distances where the question, or the edit, alone has an image, through softplus.
        self.alone = nn.Parameter(torch.ones(2))

    def observe(self, features: Features) -> None:
        """Take features into the statistics."""
        self.words.statistics.update(features.words)
        self.image.statistics.update(features.image[features.seen])

    def forward(self, questions: Features, cached: Features) -> Tensor:
        found = log_similarities(self.words(questions.words), self.words(cached.words))
        asked, known = questions.seen[:, None], cached.seen[None]
        if bool((asked & known).any()):
            images = log_similarities(self.image(questions.image), self.image(cached.image))
            found = found + torch.where(asked & known, images, 0.0)
        first, second = F.softplus(self.alone)
        return found - first * (asked & ~known) - second * (~asked & known)


class FixedScope(nn.Module):
    """A scope without training, by cosines: a baseline, whose thresholds are for the user to set.

    A question is in scope where (1 - cos of words) / (1 - `words`), and the same of the images,
    come to less than 1: similarity above a half. An edit without an image is about its words alone;
    of an edit with an image, a question without one is out of scope. Cosines of frozen features
    differ between models, so that the thresholds do: look at some of yours first.

    Args:
        words: cosine above which other words still ask the same, where the image is the same.
        image: cosine above which another image still shows the same, where the words are the same.
    """

    near: Tensor

    def __init__(self, words: float, image: float) -> None:
        super().__init__()
        self.register_buffer("near", torch.tensor([words, image]))

    def forward(self, questions: Features, cached: Features) -> Tensor:
        words, image = (math.log(2) / (1 - float(near)) for near in self.near)
        found = log_similarities(_marked(questions.words), _marked(cached.words), "cosine") * words
        images = log_similarities(_marked(questions.image), _marked(cached.image), "cosine")
        asked, known = questions.seen[:, None], cached.seen[None]
        found = found + torch.where(asked & known, images * image, 0.0)
        return found - APART * (~asked & known) - PLAIN * (asked & ~known)


def _marked(features: Tensor) -> Tensor:
    """[n, d + 1]: nothing is like nothing, and unlike anything else."""
    nothing = (features == 0).all(-1, keepdim=True).to(features)
    return torch.cat([features, nothing], dim=-1)


class Adapter(nn.Module):
    """A change of low rank of some Linears, there while it is applied; zero at the start.

    Their weights are not touched: x R^T L^T is added to what they give.

    Attributes:
        paths: of the Linears in the stock model.

    Args:
        shapes: path -> (out, in) of each.
        rank: r, cut to the smaller width.
        generator: of the draw of R, uniform within 1 / sqrt(in).
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        rank: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.paths = tuple(shapes)
        self.left, self.right = nn.ParameterList(), nn.ParameterList()
        for rows, columns in shapes.values():
            inner = min(rank, rows, columns)
            drawn = 2 * torch.rand(inner, columns, generator=generator) - 1
            self.left.append(torch.zeros(rows, inner))
            self.right.append(drawn / math.sqrt(columns))

    def fits(self, model: nn.Module) -> bool:
        """Whether the model has Linears of these shapes at these paths."""
        return all(
            isinstance(module := _at(model, path), nn.Linear)
            and (module.out_features, module.in_features) == (left.shape[0], right.shape[1])
            for path, left, right in zip(self.paths, self.left, self.right, strict=True)
        )

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The changed model inside; differentiable through the factors."""
        with ExitStack() as hooks:
            for path, left, right in zip(self.paths, self.left, self.right, strict=True):
                handle = model.get_submodule(path).register_forward_hook(_adding(left, right))
                hooks.callback(handle.remove)
            yield


def _adding(left: Tensor, right: Tensor) -> Any:
    def hook(_: nn.Module, read: tuple[Tensor, ...], output: Tensor) -> Tensor:
        change = F.linear(F.linear(read[0].to(right), right), left)
        return (output.to(change) + change).to(output.dtype)

    return hook


def _at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


class SeracNetwork(nn.Module):
    """What SERAC is trained of.

    Attributes:
        scope: TrainedScope or FixedScope.
        adapter: None where the counterfactual model is the model itself.
    """

    def __init__(self, scope: TrainedScope | FixedScope, adapter: Adapter | None = None) -> None:
        super().__init__()
        self.scope, self.adapter = scope, adapter

    @contextmanager
    def counterfactual(self, model: nn.Module) -> Iterator[None]:
        """The counterfactual model inside, which still has to read the edit."""
        if self.adapter is None:
            yield
        else:
            with self.adapter.applied(model):
                yield

    @property
    def paths(self) -> list[str]:
        """Of the Linears that the adapter changes."""
        return [] if self.adapter is None else list(self.adapter.paths)

    def equals(self, other: SeracNetwork) -> bool:
        """Whether it decides and answers in the same way, to the bit."""
        if self is other:
            return True
        mine, theirs = self.state_dict(), other.state_dict()
        return (
            self.paths == other.paths
            and list(mine) == list(theirs)
            and all(torch.equal(mine[name].cpu(), theirs[name].cpu()) for name in mine)
        )

    @classmethod
    def restored(cls, paths: Sequence[str], tensors: Mapping[str, Tensor]) -> SeracNetwork:
        """From `paths` and its state dict. Raises KeyError, RuntimeError: they are not."""
        if "scope.near" in tensors:
            scope: TrainedScope | FixedScope = FixedScope(0.0, 0.0)
        else:
            out, width = tensors["scope.words.weight"].shape
            scope = TrainedScope(width, out)
        pairs = [
            (tensors[f"{ADAPTER}left.{i}"], tensors[f"{ADAPTER}right.{i}"])
            for i in range(len(paths))
        ]
        shapes = {
            path: (left.shape[0], right.shape[1])
            for path, (left, right) in zip(paths, pairs, strict=True)
        }
        rank = max((left.shape[1] for left, _ in pairs), default=0)
        network = cls(scope, Adapter(shapes, rank) if paths else None)
        network.load_state_dict(dict(tensors))
        return network.eval().requires_grad_(False)
