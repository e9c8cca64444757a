"""A momentum encoder without a second model, its queue of features, and the loss they teach.

The momentum encoder's features are computed with averages of the trainable parameters in their
places. What is frozen is its own average.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtune.tasks.losses import Gathered
from mmtune.tuners.hooks import TrainingHooks


class MomentumEncoder:
    """The exponential moving averages of parameters: v <- decay v + (1 - decay) p, v = p at first.

    They are kept in float32 (float64 where a parameter has that): in bfloat16 a small step would
    vanish.

    Args:
        parameters: name -> parameter.
        decay: in [0, 1].
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = dict(parameters), decay
        self.averages = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self.parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take one step towards the present parameters."""
        for name, p in self.parameters.items():
            average = self.averages[name].to(p.device)
            average.mul_(self.decay).add_(p.to(average.dtype), alpha=1 - self.decay)
            self.averages[name] = average

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, without gradients, the parameters have the averages' values.

        The parameters get other memory and then their own again, so nothing of them is rounded or
        copied. Autocast keeps low-precision copies of trainable weights by parameter, not by value;
        inside, it keeps and takes none.
        """
        own = [(p, p.data) for p in self.parameters.values()]
        device = own[0][0].device.type if own else "cpu"
        uncached = torch.autocast(
            device,
            dtype=torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
            cache_enabled=False,
        )
        try:
            for name, p in self.parameters.items():
                p.data = self.averages[name].to(p.device, p.dtype)
            with torch.no_grad(), uncached:
                yield
        finally:
            for p, data in own:
                p.data = data


@dataclass(frozen=True)
class Bank:
    """Features that rows are compared with.

    Attributes:
        image: [n, e], L2-normalised.
        text: [n, e], L2-normalised, of the same pairs.
        groups: [n, g]; pairs that agree in a column are positives of each other.
    """

    image: Tensor
    text: Tensor
    groups: Tensor


class FeatureQueue:
    """The newest `size` pairs of features; the oldest make room.

    Args:
        size: pairs; 0 keeps none.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.filled = 0
        self.next = 0
        self.kept: Bank | None = None

    def after(self, batch: Bank) -> Bank:
        """The pairs of a batch, then those that are kept."""
        if self.kept is None:
            return batch
        pairs = zip(_tensors(batch), _tensors(self.kept), strict=True)
        return Bank(*(torch.cat([new, old[: self.filled]]) for new, old in pairs))

    def push(self, batch: Bank) -> None:
        """Keep the pairs of a batch, which may be longer than the queue."""
        if self.size == 0:
            return
        if self.kept is None:
            self.kept = Bank(*(x.new_zeros(self.size, *x.shape[1:]) for x in _tensors(batch)))
        count = len(batch.groups)
        newest = min(count, self.size)
        # Where the batch is longer, its first pairs have passed through the queue already.
        first = self.next + count - newest
        places = torch.arange(first, first + newest, device=batch.groups.device) % self.size
        for old, new in zip(_tensors(self.kept), _tensors(batch), strict=True):
            old[places] = new[count - newest :].detach().to(old.dtype)
        self.next = (self.next + count) % self.size
        self.filled = min(self.filled + count, self.size)

    def state_dict(self) -> dict[str, Tensor]:
        """The pairs in order of their places, and the next place."""
        if self.kept is None:
            return {}
        names = ("image", "text", "groups")
        kept = {
            n: x[: self.filled].clone() for n, x in zip(names, _tensors(self.kept), strict=True)
        }
        return kept | {"next": torch.tensor(self.next)}

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            ValueError: that queue is longer than this one, or had reached its end elsewhere.
        """
        self.filled, self.next, self.kept = 0, 0, None
        if not state:
            return
        count, place = len(state["groups"]), int(state["next"])
        if count > self.size or (count < self.size and place != count):
            raise ValueError(
                f"the checkpoint holds a queue of {count} pairs, and task.queue is {self.size}: "
                "resume with the queue that the run began with"
            )
        batch = Bank(*(state[n].to(device) for n in ("image", "text", "groups")))
        self.push(batch)
        self.next = place


def _tensors(bank: Bank) -> tuple[Tensor, Tensor, Tensor]:
    return bank.image, bank.text, bank.groups


class Momentum(TrainingHooks):
    """What a run with momentum distillation remembers; every process holds the same.

    Args:
        encoder: it takes a step after each step of the optimiser.
        queue: of the encoder's features.
        seed: of the run.

    Attributes:
        seen: pairs of all processes that the run has trained on.
    """

    replayable = False  # the queue fills, and Python knows how far

    def __init__(self, encoder: MomentumEncoder, queue: FeatureQueue, seed: int) -> None:
        self.encoder, self.queue, self.seed = encoder, queue, seed
        self.seen = 0
        self._step = 0
        self._batch = 0

    def before_step(self, step: int) -> None:
        self._step, self._batch = step, 0

    def after_step(self, step: int) -> None:
        self.encoder.update()

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1) that follow from the seed, the step and the micro-batch of the step."""
        generator = torch.Generator()
        name = f"negatives {self.seed} {self._step} {self._batch}"
        generator.manual_seed(random.Random(name).getrandbits(63))
        return torch.rand(shape, generator=generator)

    def remember(self, batch: Bank) -> None:
        """End a micro-batch, given the features of all processes."""
        self.queue.push(batch)
        self.seen += len(batch.groups)
        self._batch += 1

    def state_dict(self) -> dict[str, Tensor]:
        averages = {f"average.{n}": value for n, value in self.encoder.averages.items()}
        queue = {f"queue.{name}": value for name, value in self.queue.state_dict().items()}
        return averages | queue | {"seen": torch.tensor(self.seen)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            ValueError: that was of other parameters, or of a longer queue.
        """
        averages, queue = _below("average.", state), _below("queue.", state)
        other = averages.keys() ^ self.encoder.averages.keys()
        if other:
            raise ValueError(
                f"the checkpoint averages other parameters than those that train: "
                f"{sorted(other)[:4]}"
            )
        devices = {p.device for p in self.encoder.parameters.values()}
        device = devices.pop() if devices else torch.device("cpu")
        # Copies: a file's tensors may lie unaligned, where products round differently.
        self.encoder.averages = {n: value.to(device, copy=True) for n, value in averages.items()}
        self.queue.load_state_dict(queue, device)
        self.seen = int(state["seen"])


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def distilled_clip_loss(
    features: Bank, teacher: Bank, bank: Bank, temperature: float, alpha: float, gather: Gathered
) -> Tensor:
    """The contrastive loss whose targets are partly those of a momentum encoder.

    mean over rows i of -sum_j q_ij log softmax_j(<x_i, y'_j> / temperature), images against texts
    and texts against images, the two averaged. Over the bank of the momentum encoder's features,
    q_i = alpha softmax_j(<x'_i, y'_j> / temperature) + (1 - alpha) 1[j in P(i)] / |P(i)|, and P(i)
    are the positives of i.

    Args:
        features: x and y of this process's pairs.
        teacher: x' and y' of the same pairs, without gradients.
        bank: of all processes' pairs, then the queue's.
        temperature: divides cosines.
        alpha: share of the momentum encoder in the targets, in [0, 1].
        gather: of the pairs of all processes.

    Returns:
        Scalar; see `mmtune.tasks.losses` for its scale over processes.

    Source:
        ALBEF (arXiv 2107.07651), section 3.4, with the identity of images as in the fine-tuning of
        BLIP (arXiv 2201.12086). Differs from the released code in that the bank holds the present
        batch of every process, there of one; and that what the queue lacks yet is left out, where
        there it is random.
    """
    with torch.autocast(features.image.device.type, enabled=False):
        positive = (features.groups[:, None] == bank.groups[None]).any(2)
        hard = positive.float() / positive.sum(1, keepdim=True)
        total = features.image.new_zeros((), dtype=torch.float32)
        for x, taught, others in (
            (features.image, teacher.image, bank.text),
            (features.text, teacher.text, bank.image),
        ):
            others = others.float().T / temperature
            target = alpha * (taught.float() @ others).softmax(1) + (1 - alpha) * hard
            total = total + F.cross_entropy(x.float() @ others, target, reduction="sum")
        return gather.world * total / (2 * gather.total)
