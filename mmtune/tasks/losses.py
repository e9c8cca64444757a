"""Contrastive losses over the pairs of all processes, with the gradient of the global batch.

Every process computes the loss of its own rows against all columns. Gathering sums the gradients
that the processes send to a feature, and DistributedDataParallel then averages over w processes.
So each process's loss is w * (sum over its rows) / (pairs in all): the averaged gradient is that of
the mean over the global batch, also where processes hold different numbers of pairs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


class _Gather(torch.autograd.Function):
    """[m, ...] of every process -> [w, m, ...]; the backward pass sums over processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


def several() -> bool:
    """Whether more than one process trains."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Gathered:
    """The batches of all processes, in order of rank.

    Args:
        size: pairs of this process.
        device: where they are.

    Attributes:
        world: number of processes.
        active: whether there are several.
        sizes: pairs of each process.
        total: pairs of all processes.
        first: index of this process's first pair among them.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.active = several()
        self.world = dist.get_world_size() if self.active else 1
        self.sizes, rank = [size], 0
        if self.active:
            every = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self.world)]
            dist.all_gather(every, torch.tensor([size], device=device))
            self.sizes, rank = [int(n) for n in torch.cat(every)], dist.get_rank()
        self.total, self.first = sum(self.sizes), sum(self.sizes[:rank])

    def __call__(self, x: Tensor) -> Tensor:
        """[size, ...] of every process -> [total, ...], with gradient where x has one."""
        if not self.active:
            return x
        longest = max(self.sizes)
        padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
        parts = _Gather.apply(padded)
        return torch.cat([part[:n] for part, n in zip(parts, self.sizes, strict=True)])


def clip_loss(image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None = None) -> Tensor:
    """The symmetric InfoNCE loss of CLIP.

    mean over rows i of -mean_{p in P(i)} log softmax_j(scale <x_i, y_j>)_p, images against texts
    and texts against images, the two averaged. P(i) = {i} without groups.

    Args:
        image: [b, e], L2-normalised.
        text: [b, e], L2-normalised.
        scale: scalar.
        groups: [b, g] integers; pairs that agree in a column are positives of each other. With all
            values distinct this is the plain loss.

    Returns:
        Scalar; see the module's text for its scale over processes.

    Source: Radford et al., arXiv 2103.00020, figure 3.
    """
    with torch.autocast(image.device.type, enabled=False):
        gather = Gathered(len(image), image.device)
        x, y = image.float(), text.float()
        target = _positives(gather, groups, x.device)
        target = target / target.sum(1, keepdim=True)
        forward = F.cross_entropy(scale.float() * x @ gather(y).T, target, reduction="sum")
        backward = F.cross_entropy(scale.float() * y @ gather(x).T, target, reduction="sum")
        return gather.world * (forward + backward) / (2 * gather.total)


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    groups: Tensor | None = None,
) -> Tensor:
    """The pairwise sigmoid loss of SigLIP: -1/n sum_ij log sigmoid(z_ij (scale <x_i, y_j> + bias)).

    z is 1 for positives and -1 for all others; arguments as in `clip_loss`, bias a scalar.

    Source: Zhai et al., arXiv 2303.15343, equation 1.
    """
    with torch.autocast(image.device.type, enabled=False):
        gather = Gathered(len(image), image.device)
        logits = scale.float() * image.float() @ gather(text.float()).T + bias.float()
        signs = 2 * _positives(gather, groups, image.device) - 1
        return -gather.world * F.logsigmoid(signs * logits).sum() / gather.total


def _positives(gather: Gathered, groups: Tensor | None, device: torch.device) -> Tensor:
    """[b, total] 1.0 where the column's pair is a positive of the row's, else 0.0."""
    own = torch.arange(gather.first, gather.first + gather.size, device=device)
    found = own[:, None] == torch.arange(gather.total, device=device)[None]
    if groups is not None:
        every = gather(groups)
        found = found | (groups[:, None] == every[None]).any(2)
    return found.float()
