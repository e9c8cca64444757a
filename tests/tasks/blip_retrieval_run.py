"""A run of BLIP retrieval that kills itself in a micro-step: folder, step or 0, --resume."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from mmtune.config import TrainingOptions
from mmtune.tasks.blip_retrieval import BlipRetrievalTask
from mmtune.training import train
from tests.tasks.tiny_blip import adapted, make_task


def run(folder, kill, resume):
    """Micro-batches, a short last batch, dropout, a queue that wraps around."""
    options = TrainingOptions(
        epochs=3,
        batch_size=3,
        accumulation=2,
        drop_last=False,
        lr=1e-2,
        log_every=1,
        save_every=2,
        device="cpu",
    )
    folder.mkdir(exist_ok=True)
    task = make_task(folder, queue=7, momentum=0.8, seed=1)
    losses = 0
    plain = BlipRetrievalTask.loss

    def loss(self, model, batch):
        nonlocal losses
        losses += 1
        if losses == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, model, batch)

    BlipRetrievalTask.loss = loss
    model = adapted(task, "lora", dropout=0.1)
    train(model, task, options, folder, seed=1, resume=resume, progress=False)
    model.save_pretrained(folder / "adapter")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), int(sys.argv[2]), "--resume" in sys.argv)
