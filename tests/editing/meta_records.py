"""Edit records of random words about random pictures, for editors that are trained."""

from __future__ import annotations

import random

from editing.requests import EditRecord, EditRequest, Probe
from tests.editing.tiny import picture


def random_records(count, seed=0):
    draw = random.Random(seed)

    def words(n):
        return " ".join(f"w{draw.randrange(3, 59)}" for _ in range(n))

    def one(i):
        image, other, third = (picture(1000 * seed + 3 * i + k) for k in range(3))
        question, target = words(4), words(2)
        return EditRecord(
            EditRequest(question, target, image, id=f"{seed}-{i}"),
            text_generality=(Probe(f"{question} {words(1)}", target, image),),
            image_generality=(Probe(question, target, other),),
            text_locality=(Probe(words(4), words(2)),),
            image_locality=(Probe(words(3), words(2), third),),
            id=f"{seed}-{i}",
            where=f"made up, record {i}",
        )

    return [one(i) for i in range(count)]
