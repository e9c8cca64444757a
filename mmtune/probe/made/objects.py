"""Objects from the zoo's drawings: what is there, and whether answers hold together."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping, Sequence
from typing import Any

from mmtune.probe.items import Item
from mmtune.probe.made.canvas import Made
from mmtune.zoo.tiny_llava.questions import drawings
from mmtune.zoo.tiny_llava.things import Thing

# Drawings that no model of the zoo was trained on.
UNSEEN = (("clipart", "test"), ("clipart", "test-text"), ("clipart-animals", "test"),
          ("clipart-food", "test"))  # fmt: skip
ASKED = ("Is there {} in the picture?", "Does the image show {}?", "Can you see {} in the image?")
DENIED = "Is it true that there is no {} in the picture?"


def presence(rng: random.Random, each: int) -> Made:
    """Of each drawing, one thing that is there and one that is not, as POPE asks."""
    items, pictures = [], {}
    for number, (row, other) in enumerate(_drawn(rng, each)):
        name = _keep(row, f"presence-{number}", pictures)
        for side, thing, answer in (("a", row["thing"], "yes"), ("b", other, "no")):
            items.append(
                Item(
                    id=f"presence-{number}{side}", images=(name,), answer=answer,
                    question=ASKED[0].format(thing.named), category="objects",
                    subcategory="presence", pair_id=f"presence-{number}",
                )
            )  # fmt: skip
    return Made(tuple(items), pictures)


def naming(rng: random.Random, each: int) -> Made:
    """Which of four things a drawing shows."""
    items, pictures = [], {}
    for number, (row, _) in enumerate(_drawn(rng, each)):
        name = _keep(row, f"name-{number}", pictures)
        choices = _choices(row["thing"], rng)
        items.append(
            Item(
                id=f"name-{number}", images=(name,), question="What does the picture show?",
                answer=row["thing"].noun, choices=tuple(choices), category="objects",
                subcategory="naming",
            )
        )  # fmt: skip
    return Made(tuple(items), pictures)


def consistency(rng: random.Random, each: int) -> Made:
    """Paraphrases and orders of choices, which have one answer; a negation, which has the other."""
    items, pictures = [], {}
    for number, (row, other) in enumerate(_drawn(rng, each)):
        name = _keep(row, f"same-{number}", pictures)
        kind = ("paraphrases", "negation", "order of choices")[number % 3]
        there = rng.random() < 0.5
        thing = row["thing"] if there else other
        known: dict[str, Any] = {
            "images": (name,), "category": "self-consistency", "subcategory": kind,
            "pair_id": f"same-{number}", "relation": "flip" if kind == "negation" else "same",
        }  # fmt: skip
        yes, no = ("yes", "no") if there else ("no", "yes")
        if kind == "paraphrases":
            asked = [(words.format(thing.named), yes, ()) for words in ASKED]
        elif kind == "negation":
            asked = [(ASKED[0].format(thing.named), yes, ()), (DENIED.format(thing.noun), no, ())]
        else:
            choices = _choices(row["thing"], rng)
            turned = [tuple(choices[i:] + choices[:i]) for i in range(3)]
            asked = [("What does the picture show?", row["thing"].noun, t) for t in turned]
        items += [
            Item(
                id=f"same-{number}{'abc'[i]}",
                question=question,
                answer=answer,
                choices=given,
                **known,
            )
            for i, (question, answer, given) in enumerate(asked)
        ]
    return Made(tuple(items), pictures)


def _drawn(rng: random.Random, count: int) -> list[tuple[Mapping[str, Any], Thing]]:
    """Drawings of different things, each with a thing that it does not show."""
    rows = [row for name, split in UNSEEN for row in drawings(name, split)]
    rng.shuffle(rows)
    by_thing: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        by_thing.setdefault(row["thing"].noun, row)
    chosen: Sequence[Mapping[str, Any]] = list(by_thing.values())[:count]
    others = sorted({(t.kind, t.noun): t for t in (r["thing"] for r in rows)}.items())
    found = []
    for row in chosen:
        apart = [t for (kind, noun), t in others if kind != row["thing"].kind]
        found.append((row, rng.choice(apart)))
    return found


def _choices(thing: Thing, rng: random.Random) -> list[str]:
    nouns = {t["thing"].noun for name, split in UNSEEN for t in drawings(name, split)
             if t["thing"].kind != thing.kind}  # fmt: skip
    choices = [thing.noun, *rng.sample(sorted(nouns), 3)]
    rng.shuffle(choices)
    return choices


def _keep(row: Mapping[str, Any], name: str, pictures: dict[str, Any]) -> str:
    from PIL import Image

    path = f"images/{name}.png"
    pictures[path] = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
    return path
