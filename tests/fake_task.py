"""A small regression task with its own model: trains in milliseconds, as every task must."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn

from mmtune.config import TrainingOptions
from mmtune.device import leave_together
from mmtune.tasks.base import Evaluation, Metric, Task
from mmtune.training import train


@dataclass(frozen=True)
class FakeOptions:
    scale: float = 1.0


class Samples(torch.utils.data.Dataset):
    def __init__(self, task, count):
        self.task, self.count, self.read = task, count, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append((self.task.epoch, index))
        generator = torch.Generator().manual_seed(index * 1000 + self.task.epoch)
        return torch.randn(6, generator=generator)


class FakeTask(Task):
    """Learn to reverse a vector; a sample depends on (epoch, index) only."""

    name: ClassVar[str] = "fake"
    summary: ClassVar[str] = "reverse a vector"
    options: ClassVar[type] = FakeOptions

    def __init__(self, count=22, kill_in_step=None, scale=1.0):
        self.epoch, self.scale, self.kill_in_step = -1, scale, kill_in_step
        self.train_dataset = Samples(self, count)
        self.losses = 0
        self.epochs = []

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.epochs.append(epoch)

    def before_training(self, model):
        pass

    def collate(self, samples):
        x = torch.stack(samples)
        return {"x": x, "y": x.flip(1)}

    def loss(self, model, batch):
        self.losses += 1
        if self.losses == self.kill_in_step:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = self.scale * (model(batch["x"]) - batch["y"]).square().mean()
        return loss, {"size": float(len(batch["x"]))}

    def evaluate(self, model, split="test", progress=True):
        x = torch.randn(50, 6, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            was = model.training
            model.eval()
            error = (model(x.to(next(model.parameters()).device)) - x.flip(1)).square().mean()
            model.train(was)
        value = -float(error)
        return Evaluation({"minus_error": Metric(value, value, value, 50)}, "minus_error")

    def compare(self, before, after):
        return {}

    def gallery(self, before, after, limit=12):
        return []


def make_model(dropout=0.2, method="lora"):
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(6, 16), nn.Dropout(dropout), nn.Tanh(), nn.Linear(16, 6))
    common = {"target_modules": ["0", "3"], "lora_dropout": dropout / 2}
    if method == "adalora":
        schedule = {"tinit": 10, "tfinal": 30, "total_step": 100}
        settings = AdaLoraConfig(**common, init_r=4, target_r=2, **schedule)
    else:
        settings = LoraConfig(**common, r=4)
    return get_peft_model(base, settings)


def resumable(folder, kill_in_step, evaluate, method, resume):
    """A run with everything that a resume must restore: dropout, accumulation, short last batch."""
    options = TrainingOptions(
        epochs=4,
        batch_size=4,
        accumulation=2,
        drop_last=False,
        lr=1e-2,
        warmup=0.1,
        log_every=3,
        save_every=2,
        device="cpu",
        evaluate=evaluate,
        keep="best" if evaluate == "epoch" else "last",
    )
    model = make_model(method=method)
    task = FakeTask(kill_in_step=kill_in_step or None)
    train(model, task, options, folder, seed=1, resume=resume, progress=False)
    return model


def divided(folder, batch_size):
    """A run without dropout, the same whether one process or several share the batch."""
    options = TrainingOptions(
        epochs=2, batch_size=batch_size, lr=1e-2, log_every=1, save_every=4, device="cpu"
    )
    model = make_model(dropout=0.0)
    train(model, FakeTask(count=24), options, folder, progress=False)
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    to = Path(sys.argv[2])
    if sys.argv[1] == "resumable":
        trained = resumable(to, int(sys.argv[3]), *sys.argv[4:6], "--resume" in sys.argv)
    else:
        trained = divided(to, int(sys.argv[3]))
    if os.environ.get("RANK", "0") == "0":
        trained.save_pretrained(to / "adapter")
    leave_together()
