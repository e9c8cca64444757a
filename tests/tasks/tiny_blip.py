"""A tiny random BlipForImageTextRetrieval with a tokenizer of words, and its retrieval task."""

from __future__ import annotations

import torch

from mmtune.conformance.backbones import CONTEXT, IMAGE, VOCABULARY, build
from mmtune.tasks.blip_retrieval import BlipRetrievalOptions, BlipRetrievalTask
from mmtune.tuners import registry
from tests.tasks.tiny import colour_data, with_words

ENCODE = 2  # no word has this id


def tiny_blip(seed=0):
    model = build("blip-retrieval", seed)
    return with_words(model, IMAGE, CONTEXT, begin=1, end=VOCABULARY - 1, pad=0)


def make_task(folder, captions=None, loaded=None, seed=0, **settings):
    """The task on eight pictures with two captions each."""
    chosen = {"augment": None, "resamples": 100, "queue": 11, "match_token": ENCODE} | settings
    options = BlipRetrievalOptions(**chosen)
    data = colour_data(folder, captions)
    return BlipRetrievalTask(options, data, loaded or tiny_blip(), seed, progress=False)


def adapted(task, method="lora", seed=0, **options):
    """The task's model with a fresh adapter and the task's heads."""
    torch.manual_seed(seed)
    backbone = task.loaded.backbone
    backbone.prepare()
    chosen = registry.method(method).options(**options)
    return registry.apply(
        task.loaded.model, method, chosen, heads=task.heads(task.settings, backbone)
    )


def batch_of(task, indices):
    return task.collate([task.train_dataset[i] for i in indices])


def trained_parameters(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}
