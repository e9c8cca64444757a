"""Tiny models that can be told something, and settings of closed-form editors for them."""

from __future__ import annotations

import torch

from editing.closed_form.texts import CovarianceOptions
from editing.closed_form.values import ValueOptions
from editing.methods.alphaedit import AlphaEditOptions
from editing.methods.memit import MemitOptions, SpreadValueOptions
from editing.methods.rome import RomeOptions
from editing.requests import EditRequest
from tests.editing.tiny import SEEN, picture, tiny

MODELS = ("blip2-opt", "blip2-t5", "llava", "qwen2")
EDITORS = ("rome", "memit", "alphaedit")
ONE = EditRequest(SEEN.question, "w40", SEEN.image, id="one")
TWO = EditRequest("w6 w4", "w42", picture(1), id="two")
BARE = EditRequest("w10 w11 w12", "w43", id="bare", subject="w11")
TEXT = [
    " ".join(f"w{3 + (i * i * 7 + j * (i + 3)) % 56}" for j in range(3 + i % 9)) for i in range(60)
]


def outspoken(name, dtype=torch.float32):
    """A model whose last state decides what it says; a random head hardly tells words apart."""
    mllm = tiny(name, dtype)
    model = mllm.model
    head = model.lm_head if hasattr(model, "lm_head") else model.language_model.lm_head
    if name != "blip2-t5":  # whose head is a strong one already
        head.weight.data.mul_(30)
    return mllm


def covariance(folder, **settings):
    file = folder / "texts.txt"
    file.write_text("\n".join(TEXT))
    defaults = {"texts": str(file), "tokens": 100, "cache": str(folder / "cache")}
    return CovarianceOptions(**{**defaults, **settings})


def options(kind, folder, **settings):
    """The top layer, in which a place at the prompt's end decides the answer's first token."""
    known = settings.pop("covariance", None) or covariance(folder)
    given = {"prefixes": 0, "covariance": known}
    # What a tiny MLP puts out is small beside what passes it by.
    lr, clamp = (30.0, 1000.0) if kind == "rome" else (1.0, 5.0)
    search = {"steps": 30, "lr": lr, "clamp": clamp, "decay": 0.0, "kl": 0.0}
    search |= settings.pop("search", {})
    given["value"] = (ValueOptions if kind == "rome" else SpreadValueOptions)(**search)
    if kind == "rome":
        return RomeOptions(**{**given, "layer": -1, **settings})
    given |= {"layers": (-2, -1)}
    if kind == "memit":
        return MemitOptions(**{**given, "preservation": 0.01, **settings})
    return AlphaEditOptions(**{**given, "ridge": 1e-4, **settings})


def first_logs(mllm, asked):
    """[n] log p of the first token of each target."""
    batch = mllm.batch(asked)
    logs = mllm.answer_logits(batch)[:, 0].log_softmax(-1)
    return logs.gather(1, batch.target_ids[:, :1])[:, 0]
