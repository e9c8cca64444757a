"""E-VQA: questions about images that a model answers wrongly."""

from __future__ import annotations

from data_builders.recipes import Recipe

EVQA = Recipe(
    name="evqa",
    summary="questions that the model answers wrongly, in other words and about other images",
    samples={
        "select": "questions",
        "rephrase": "chat",
        "imagine": "diffusers",
        "filter": "clip",
    },
    pool={"consistent": "twice"},
)
