"""The second moment C = E[k k^T] of the keys that a layer usually looks up, computed once.

k is what fc2 of an MLP is given at one token. A change D of fc2's weight moves its output at the
keys that were read by E|D k|^2 = tr(D C D^T): what ROME, MEMIT and AlphaEdit keep small.

Source: Meng et al., arXiv 2202.05262, section 3.1 and appendix E.5, who read 100,000 samples of
Wikipedia.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from editing.closed_form.places import See, Stack, stack_of, tapped, valid
from editing.closed_form.texts import Corpus, CovarianceError, CovarianceOptions, corpus
from editing.edits import set_aside, unedited
from editing.fingerprints import Fingerprint
from mmtune.runs import write_tensors

if TYPE_CHECKING:
    from editing.batches import Batch, Part
    from editing.mllm import MLLM
    from mmtune.backbones.base import Site

FORMAT = "1"


@dataclass(eq=False)
class Covariance:
    """Of one layer's keys, of width d.

    Attributes:
        moment: [d, d] mean of k k^T, float32, on the CPU.
        tokens: keys that it is the mean of.
        ridge: added to the diagonal, in units of its mean.
        device: where it is factorised.
    """

    moment: Tensor
    tokens: int
    ridge: float
    device: torch.device

    @property
    def scale(self) -> float:
        """Mean of the diagonal: what each number of a key is squared, on average."""
        return float(self.moment.diagonal().double().mean())

    @property
    def matrix(self) -> Tensor:
        """[d, d] in float64, with the ridge: positive definite."""
        exact = self.moment.to(self.device, torch.float64, copy=True)
        exact.diagonal().add_(self.ridge * self.scale)
        return exact

    @cached_property
    def factor(self) -> Tensor:
        """[d, d] the Cholesky factor of `matrix`, on the CPU."""
        return torch.linalg.cholesky(self.matrix).cpu()

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [d] of `moment`, ascending, and eigenvectors [d, d] as columns; float64."""
        values, vectors = torch.linalg.eigh(self.moment.to(self.device, torch.float64))
        return values.cpu(), vectors.cpu()

    def solved(self, keys: Tensor) -> Tensor:
        """[n, d]: C^-1 k for each key [n, d], with the ridge, in float64 on the CPU."""
        return torch.cholesky_solve(keys.double().cpu().T, self.factor).T


# Of each model: (identity, ridge) -> covariance, with its factors.
_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple[str, float], Covariance]] = WeakKeyDictionary()


def covariances(
    mllm: MLLM, sites: Sequence[Site], options: CovarianceOptions, progress: bool = True
) -> list[Covariance]:
    """The covariances of some fc2 sites, from memory, from the folder of the options, or computed.

    They are of the unedited model, whatever edits are applied now.

    Args:
        mllm: the model.
        sites: fc2 of the language branch.
        options: what is read, how much of it, and where results are kept.
        progress: draw a bar while they are computed.

    Raises:
        CovarianceError: a file that is damaged, or is another model's; nothing to read.
    """
    read = corpus(mllm, options)
    names = _identities(mllm, sites, read, options)
    known = _KNOWN.setdefault(mllm.model, {})
    folder = Path(options.cache).expanduser()

    def keep(name: str, moment: Tensor, tokens: int) -> None:
        known[name, options.ridge] = Covariance(moment, tokens, options.ridge, mllm.device)

    for name in names:
        if (name, options.ridge) not in known and (path := _file(folder, name)).exists():
            keep(name, *_read(path, name))
    missing = {
        site.path: name
        for site, name in zip(sites, names, strict=True)
        if (name, options.ridge) not in known
    }
    if missing:
        lacking = [site for site in sites if site.path in missing]
        with set_aside(mllm):
            found = measured(mllm, lacking, read, options.tokens, progress)
        folder.mkdir(parents=True, exist_ok=True)
        for path, (moment, tokens) in found.items():
            about = {"identity": missing[path], "tokens": str(tokens), "layer": path}
            write_tensors(_file(folder, missing[path]), {"moment": moment}, about)
            keep(missing[path], moment, tokens)
    return [known[name, options.ridge] for name in names]


@torch.no_grad()
def measured(
    mllm: MLLM, sites: Sequence[Site], read: Corpus, most: int, progress: bool = False
) -> dict[str, tuple[Tensor, int]]:
    """Path of a site -> (mean of k k^T [d, d] in float32, summed in float64; how many keys).

    Args:
        mllm: the model, without edits.
        sites: fc2.
        read: what it reads; padding does not count.
        most: keys counted at most, the first ones.
        progress: draw a bar.

    Raises:
        CovarianceError: nothing was read.
    """
    from tqdm.auto import tqdm

    sums = {site.path: _Sum(stack_of(mllm.backbone, site), most) for site in sites}
    with tqdm(total=most, desc="covariances", unit="token", disable=not progress) as bar:
        for batch in read.batches():
            seen = {s.path: (s.module, sums[s.path].add_to(batch)) for s in sites}
            with tapped(batch, seen):
                mllm.answer_logits(batch)
            bar.update(min(s.count for s in sums.values()) - bar.n)
            if bar.n >= most:
                break
    if not all(s.count for s in sums.values()):
        raise CovarianceError("there was nothing to read: covariance.texts names an empty file")
    return {path: (s.mean().float().cpu(), s.count) for path, s in sums.items()}


class _Sum:
    """Of k k^T over tokens, in float64."""

    def __init__(self, stack: Stack, most: int) -> None:
        self.stack: Stack = stack
        self.most = most
        self.count = 0
        self.total: Tensor | None = None

    def add_to(self, batch: Batch) -> See:
        """What sees the calls of a module while this batch is read."""

        def see(part: Part, given: Tensor, out: Tensor) -> None:
            tokens = given[valid(batch, part, self.stack, given.shape[1])]
            keys = tokens[: self.most - self.count].double()
            product = keys.T @ keys
            self.total = product if self.total is None else self.total.add_(product)
            self.count += len(keys)

        return see

    def mean(self) -> Tensor:
        assert self.total is not None
        return self.total / self.count


def _identities(
    mllm: MLLM, sites: Sequence[Site], read: Corpus, options: CovarianceOptions
) -> list[str]:
    """What tells each covariance from those of other models, layers, texts, numbers of tokens."""
    names = [name for name, _ in mllm.model.named_parameters()]
    made_on = Fingerprint.of(mllm.model, unedited(mllm.model, names)).json()
    shared = [FORMAT, made_on, read.name, options.tokens, options.images]
    digest = hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()
    return [hashlib.sha256(f"{digest} {s.path}".encode()).hexdigest() for s in sites]


def _file(folder: Path, identity: str) -> Path:
    return folder / f"{identity[:32]}.safetensors"


def _read(path: Path, identity: str) -> tuple[Tensor, int]:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            about: Mapping[str, str] = file.metadata() or {}
            moment, tokens = file.get_tensor("moment"), int(about["tokens"])
    except Exception as error:  # safetensors raises its own
        raise CovarianceError(
            f"{path} holds no covariance that can be read ({error}): delete it, and it is computed "
            "anew"
        ) from None
    if about.get("identity") != identity:
        raise CovarianceError(
            f"{path} holds the covariance of another model, layer or text ({about.get('layer')}): "
            "delete it, and it is computed anew"
        )
    return moment, tokens
