"""Edit records about clipart: what a model gets wrong, with the zoo's drawings as neighbours.

    python -m data_builders.clipart_edits --out runs/data/clipart-edits --limit 16

Asks a model what drawings show. Where it is wrong, the right answer is the target; the second
wording of the question and another drawing of the same thing measure whether the edit carries over;
a question of general knowledge that the model truly answers, and the same kind of question about a
drawing of something else, which it answers rightly, measure whether it stays where it belongs. The
file has E-VQA's fields, images beside it, and the same options give the same bytes.

With --counterfactual it makes training records without end, as MEND, SERAC and KE want them: where
the model is right, another answer is the target. Sets to measure by, of any model and any images,
are made by `mmtune build`.
"""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_builders.general_facts import facts, is_right
from data_builders.sources.clipart import SPLITS
from editing.datasets import FIELDS, write_items
from editing.requests import Probe
from mmtune.data.records import ImageBytes
from mmtune.data.texts import normalised
from mmtune.runs import write_text
from mmtune.zoo.tiny_llava.questions import Question, alike, ask, drawings

log = logging.getLogger(__name__)

KINDS = ("name", "kind")  # questions whose answers are words of their own, not yes or no
BATCH = 16
NOTE = """\
Edit records in E-VQA's format, made by data_builders/clipart_edits.py from the zoo's drawings
(Open Clip Art Library, public domain) and the answers of {model}.
Records: {count}, of {asked} questions asked about the {split} drawings; seed {seed}.
A target is what the drawing's own title says; nobody looked at each of them.
"""
FILLED = """\
{count} of them are counterfactual (`counterfactual`: true): the model was right, and the target is
something else. They serve to train editors and say nothing about the drawing.
"""
Answer = Callable[[Sequence[Probe]], list[str]]


@dataclass(frozen=True)
class Told:
    """A question about a row with what the model answered."""

    row: Mapping[str, Any]
    question: Question
    said: str

    @property
    def right(self) -> bool:
        """Whether that is the answer."""
        return normalised(self.said) == normalised(self.question.answer)


@dataclass(frozen=True)
class Built:
    """Records as items of a file, the pictures that they name, and how they came about."""

    items: list[dict[str, Any]]
    pictures: dict[str, bytes]
    asked: int
    counterfactual: int


def told(rows: Sequence[Mapping[str, Any]], answer: Answer, rng: random.Random) -> Iterator[Told]:
    """Ask one question of each kind about each row, in random order, a batch at a time."""
    things = [row["thing"] for row in rows]
    order = [(i, kind) for i in range(len(rows)) for kind in KINDS]
    rng.shuffle(order)
    for start in range(0, len(order), BATCH):
        some = [
            (rows[i], ask(rows[i], kind, rng, things)) for i, kind in order[start : start + BATCH]
        ]
        given = answer([_probe(row, question) for row, question in some])
        yield from (Told(row, q, said) for (row, q), said in zip(some, given, strict=True))


def known_facts(answer: Answer, split: str) -> list[tuple[str, str]]:
    """The questions of general knowledge that are truly answered, with the answers as written.

    Those of the splits are apart, so that no editor is trained on what it is measured by.
    """
    part = sorted(SPLITS).index(split)
    every = dict(list(facts().items())[part :: len(SPLITS)])
    asked = [Probe(question, "") for question in every]
    given = [said for i in range(0, len(asked), BATCH) for said in answer(asked[i : i + BATCH])]
    pairs = zip(every.items(), given, strict=True)
    return [(question, said) for (question, word), said in pairs if is_right(said, word)]


def build(
    answer: Answer,
    split: str = "test",
    limit: int = 16,
    seed: int = 0,
    counterfactual: bool = False,
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> Built:
    """Ask until `limit` records are found, or no drawing is left.

    Args:
        answer: a model's answers to probes.
        split: "test" for drawings that the zoo's models never saw, "train" for the others.
        limit: records.
        seed: of the order and the wordings.
        counterfactual: where the model is right, take another thing as the target: training records
            without end, which teach an editor to edit and no facts.
        rows: drawings in place of those of the split.

    Raises:
        ValueError: the model answers no fact, or no drawing of anything, rightly.
    """
    rng = random.Random(seed)
    rows = (
        [r for name, part in SPLITS[split] for r in drawings(name, part)] if rows is None else rows
    )
    fixed = known_facts(answer, split)
    if not fixed:
        raise ValueError("the model answers no question of general knowledge rightly")
    edits, keepers, made, asked = [], [], 0, 0
    for one in told(rows, answer, rng):
        asked += 1
        others = alike(rows, one.row)
        if one.right:
            keepers.append(one)
        if others and (counterfactual or not one.right):
            edits.append((one, rows[rng.choice(others)]))
        if len(edits) >= limit and len(keepers) > len(KINDS):
            break
    if not keepers:
        raise ValueError("the model answers no question about a drawing rightly")
    items, pictures = [], {}
    for one, other in edits[:limit]:
        target, invented = _target(one, rows, rng)
        kept = _keeper(one, target, keepers, rng)
        made += invented
        named = [_picture(row, pictures) for row in (one.row, other, kept.row)]
        fact, truth = rng.choice(fixed)
        values = (
            one.question.text, one.said, target, one.question.rephrased, named[0], named[1],
            fact, truth, named[2], kept.question.text, kept.said,
        )  # fmt: skip
        item = dict(zip(FIELDS, values, strict=True)) | {"kind": one.question.kind}
        items.append(item | ({"counterfactual": True} if invented else {}))
    return Built(items, pictures, asked, made)


def _target(one: Told, rows: Sequence[Mapping[str, Any]], rng: random.Random) -> tuple[str, bool]:
    """The right answer; of one that was answered rightly another thing's, and True."""
    if not one.right:
        return one.question.answer, False
    field = {"name": "noun", "kind": "kind"}[one.question.kind]
    words = sorted({getattr(row["thing"], field) for row in rows} - {one.question.answer})
    return rng.choice(words), True


def _keeper(one: Told, target: str, keepers: Sequence[Told], rng: random.Random) -> Told:
    """A right answer of the same kind about something else, which is not the target."""
    apart = [k for k in keepers if k.row["thing"] != one.row["thing"] and k.said != target]
    same = [k for k in apart if k.question.kind == one.question.kind]
    return rng.choice(same or apart or list(keepers))


def _probe(row: Mapping[str, Any], question: Question) -> Probe:
    return Probe(question.text, question.answer, ImageBytes(row["image"]["bytes"]))


def _picture(row: Mapping[str, Any], pictures: dict[str, bytes]) -> str:
    """The name of a row's picture, which is noted down."""
    data = row["image"]["bytes"]
    ending = "png" if data.startswith(b"\x89PNG") else "jpg"
    name = f"images/{row['id'].removesuffix('.svg').replace('/', '-')}.{ending}"
    pictures[name] = data
    return name


def write(built: Built, out: Path, split: str, note: str) -> Path:
    """Write SPLIT.json, its images and a note. Returns the path of the JSON file."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    for name, data in built.pictures.items():
        partial = out / f"{name}.partial"
        partial.write_bytes(data)
        partial.replace(out / name)
    write_text(out / f"{split}.txt", note)
    write_items(out / f"{split}.json", built.items)
    return out / f"{split}.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--model", default="zoo:tiny-llava", help="default: %(default)s")
    parser.add_argument("--split", choices=tuple(SPLITS), default="test")
    parser.add_argument("--limit", type=int, default=16, help="records (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--counterfactual", action="store_true", help="right answers too, with another target"
    )
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from editing.config import EditModelOptions
    from editing.loading import mllm_of

    mllm = mllm_of(EditModelOptions(given.model))
    built = build(mllm.answer, given.split, given.limit, given.seed, given.counterfactual)
    fill = FILLED.format(count=built.counterfactual) if built.counterfactual else ""
    count = len(built.items)
    note = NOTE.format(count=count, asked=built.asked, **vars(given)) + fill
    path = write(built, given.out, given.split, note)
    log.info("%s", note.rstrip())
    log.info("%s", path)


if __name__ == "__main__":
    main()
