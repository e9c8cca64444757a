"""E-IC: captions that a model gets wrong."""

from __future__ import annotations

from data_builders.recipes import Recipe

EIC = Recipe(
    name="eic",
    summary="images that the model describes wrongly, asked for in other words",
    samples={
        "select": "captions",
        "rephrase": "templates",
        "imagine": "diffusers",
        "filter": "clip",
    },
    pool={"consistent": "twice"},
)
