"""Editors with a memory inside the model, set so that tiny models learn a fact in little time."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from editing.methods.base import editor
from editing.methods.grace import GraceOptions
from editing.methods.liveedit import LiveEditOptions
from editing.methods.wise import WiseOptions
from editing.requests import EditRequest
from tests.editing.tiny import PROBES, picture, tiny

UNRELATED = tuple(probe.question for probe in PROBES if probe.question)
OPTIONS = {
    "grace": GraceOptions(radius=1e-3, replacement="prompt", steps=80, lr=0.5, certainty=0.0),
    "wise": WiseOptions(
        optimiser="adam",
        share=0.9,
        shards=1,
        shard_size=1,
        bound=50.0,
        alpha=6.0,
        beta=8.5,
        gamma=2.0,
        unrelated=UNRELATED,
        steps=80,
        lr=0.1,
        certainty=0.0,
    ),
    "liveedit": LiveEditOptions(
        image_above=0.99999, words_above=0.99, alone_above=0.99, steps=80, lr=0.1, certainty=0.0
    ),
}
WORDS = dict.fromkeys(
    ("qwen2", "qwen3-vl", "minigpt4"), 41
)  # what a tiny model can be brought to say; 23 in other models
LOUD = dict.fromkeys(
    ("llava", "qwen2", "minigpt4"), 0.5
)  # learning rate of WISE; gated MLPs have small activations


def request(i, image=True):
    """The i-th of many facts that have nothing in common."""
    question = f"w{5 + i % 7} w9 w7 w{3 + i % 11}"
    return EditRequest(question, f"w{i}", picture(i) if image else None, id=str(i))


def fact(name="llava", image=True):
    return request(WORDS.get(name, 23), image)


def memory_editor(kind, name="llava", **settings):
    chosen = OPTIONS[kind]
    if kind == "wise" and name in LOUD:
        chosen = replace(chosen, lr=LOUD[name])
    return editor(kind, replace(chosen, **settings))


@cache
def taught(kind, name="llava", dtype=torch.float32):
    """An edit of `fact(name)`, made once: tiny models of one name have the same bits."""
    settings = {"radius": 0.05} if (kind, dtype) == ("grace", torch.bfloat16) else {}
    return memory_editor(kind, name, **settings).edit(tiny(name, dtype), [fact(name)])
