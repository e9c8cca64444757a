"""Two linear towers with temperature and bias, and the batches that processes divide."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from mmtune.tasks.losses import clip_loss, sigmoid_loss

# name -> (loss, pairs on each of two processes, whether pairs share groups)
CASES = {
    "clip": ("clip", (4, 4), False),
    "sigmoid": ("sigmoid", (4, 4), False),
    "clip-groups": ("clip", (4, 4), True),
    "sigmoid-groups": ("sigmoid", (4, 4), True),
    "clip-uneven": ("clip", (5, 2), True),
    "sigmoid-uneven": ("sigmoid", (2, 5), True),
}


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.image = nn.Parameter(torch.randn(6, 5, generator=generator))
        self.text = nn.Parameter(torch.randn(6, 5, generator=generator))
        self.log_scale = nn.Parameter(torch.tensor(1.5))
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, x, y):
        image, text = F.normalize(x @ self.image, dim=1), F.normalize(y @ self.text, dim=1)
        return image, text, self.log_scale.exp(), self.bias


def whole(name):
    count = sum(CASES[name][1])
    generator = torch.Generator().manual_seed(9)
    x, y = (torch.randn(count, 6, generator=generator) for _ in range(2))
    image = torch.tensor([0, 1, 2, 3, 4, 0, 6, 7])[:count]
    text = torch.tensor([0, 1, 1, 3, 4, 5, 3, 7])[:count]
    return x, y, torch.stack([image, text], 1)


def share(name, rank):
    sizes = CASES[name][1]
    first = sum(sizes[:rank])
    return [part[first : first + sizes[rank]] for part in whole(name)]


def case_loss(model, batch, name):
    kind, _, grouped = CASES[name]
    x, y, groups = batch
    image, text, scale, bias = model(x, y)
    chosen = groups if grouped else None
    if kind == "clip":
        # DDP wants a gradient for every parameter; the softmax loss has no bias.
        return clip_loss(image, text, scale, chosen) + 0 * bias
    return sigmoid_loss(image, text, scale, bias, chosen)
