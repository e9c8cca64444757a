"""A trained editor whose network is a few numbers: what the training loop does is seen at once.

Run as a program it trains, and kills itself where it is told to.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from editing.edits import ContextEdit
from editing.meta import checkpoints
from editing.meta.base import TrainedEditor
from editing.meta.config import MetaTrainingOptions
from editing.meta.training import train_editor
from editing.meta.weights import TrainedWeightOptions
from editing.regions import parameters_of
from tests.editing.meta_records import random_records
from tests.editing.tiny import tiny

OPTIONS = MetaTrainingOptions(
    steps=13, batch_size=2, lr=0.05, accumulation=2, validate_every=3, log_every=2, save_every=4
)
RECORDS, VAL = random_records(5, seed=1), random_records(3, seed=2)


class Numbers(nn.Module):
    """Four numbers to be learned, and how many records were seen."""

    def __init__(self, generator):
        super().__init__()
        self.values = nn.Parameter(torch.randn(4, generator=generator))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))


class Stub(TrainedEditor):
    """Pulls its numbers to a number that each record has; draws from every generator."""

    name = "stub"
    summary = "nothing"
    source = "nowhere"
    options = TrainedWeightOptions
    upwards = 0.0  # how much worse each validation is than the one before
    validations = 0
    on_losses = staticmethod(lambda self, network, records: None)

    def begin(self, mllm, generator):
        return Numbers(generator)

    def weights(self, mllm):
        return parameters_of(mllm.backbone, self.settings.region)

    def losses(self, mllm, network, records, generator):
        self.on_losses(self, network, records)
        goals = torch.tensor([float(len(r.request.question)) / 10 for r in records])
        if network.training:
            network.seen += len(records)
            goals = goals + torch.randn(len(records), generator=generator) / 9
        kept = nn.functional.dropout(network.values, 0.5, network.training)
        edit = (kept[None] - goals[:, None]).square().mean()
        worse = 0.0 if network.training else self.upwards * self.validations
        return {"edit": edit, "image_locality": network.values.square().mean() / 50 + worse}

    def edit_with(self, mllm, network, requests, generator):
        self.validations += 1
        return ContextEdit("")


def trained(folder, resume=False, editor=None, **changes):
    options = MetaTrainingOptions(**{**vars(OPTIONS), **changes})
    return train_editor(
        editor or Stub(), tiny("llava"), RECORDS, VAL, options, Path(folder), 3, resume, False
    )


if __name__ == "__main__":
    calls, sync = [], checkpoints.sync

    def killed(path):
        calls.append(path)
        if len(calls) == 2:  # in the middle of the second checkpoint
            os.kill(os.getpid(), signal.SIGKILL)
        sync(path)

    checkpoints.sync = killed
    trained(sys.argv[1])
