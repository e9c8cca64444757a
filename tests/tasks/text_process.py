"""Batches of texts that two processes share, and runs that are killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from mmtune.config import TrainingOptions
from mmtune.data.transforms import AugmentOptions
from mmtune.tasks.captioning import CaptioningOptions, CaptioningTask
from mmtune.tasks.vqa import VqaOptions, VqaTask
from mmtune.training import train
from tests.tasks.group import forked, in_group, status
from tests.tasks.shapes import caption_data, loaded, question_data

SHARES = {"vqa": (5, 2), "caption": (2, 5)}  # samples on each of two processes


def make(kind, folder, augment=None):
    """A task on a tiny model, which is wrapped with LoRA on every Linear."""
    torch.manual_seed(0)
    if kind == "vqa":
        options, data = VqaOptions(augment=augment, resamples=100), question_data(folder)
        task = VqaTask(options, data, loaded("vqa"), 0, progress=False)
    else:
        options = CaptioningOptions(prompt="a picture of", augment=augment, resamples=100)
        task = CaptioningTask(options, caption_data(folder), loaded("caption"), 0, progress=False)
    task.loaded.backbone.prepare()
    config = LoraConfig(target_modules="all-linear", r=4, lora_alpha=8, init_lora_weights=False)
    return task, get_peft_model(task.loaded.model, config)


def batch_of(task, kind, first, count):
    """Questions with one answer and with two, captions of different lengths."""
    step = 1 if kind == "vqa" else 2
    return task.collate([task.train_dataset[step * i] for i in range(first, first + count)])


def share(rank, folder):
    for kind, sizes in SHARES.items():
        own = folder / f"{kind}-data-{rank}"
        own.mkdir()
        task, model = make(kind, own)
        wrapped = DistributedDataParallel(model)
        loss, _ = task.loss(wrapped, batch_of(task, kind, sum(sizes[:rank]), sizes[rank]))
        loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        torch.save({"loss": loss.detach(), **found}, folder / f"{kind}-{rank}.pt")


def run(kind, folder, kill_in_step, resume):
    folder.mkdir(exist_ok=True)
    task, model = make(kind, folder, AugmentOptions(flip=0.5))
    loss, calls = task.loss, [0]

    def counted(*args):
        calls[0] += 1
        if calls[0] == kill_in_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(*args)

    task.loss = counted
    options = TrainingOptions(
        epochs=8,
        max_steps=8,
        batch_size=8,
        lr=1e-3,
        save_every=2,
        log_every=1,
        device="cpu",
    )
    train(model, task, options, folder / "run", seed=1, resume=resume, progress=False)
    model.save_pretrained(folder / "adapter")


def main(folder):
    found = {"share": in_group(share, folder)}
    for kind in SHARES:
        whole, cut = folder / f"{kind}-whole", folder / f"{kind}-cut"
        runs = [(whole, 0, False), (cut, 6, False), (cut, 0, True)]
        found[kind] = [status(forked(run, kind, *arguments)) for arguments in runs]
    (folder / "status.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
