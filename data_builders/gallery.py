"""A built set as one HTML file to look at: records with their pictures, counts, times."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from data_builders.samples import Candidate, Keeper, Sample, seed_of
from mmtune.data.records import ImageProblem
from mmtune.report.html import fill
from mmtune.report.pictures import Pictures as Encoded

if TYPE_CHECKING:
    from data_builders.builds import Build, StageReport
    from data_builders.pictures import Pictures
    from data_builders.stages.assemble import Assembled

EDGE = 240  # pixels; shown at up to 170 CSS pixels
REJECTED = 4  # candidates of a record that are shown with why they were turned down
DEFECTS = 10
CLIP = "clip_"  # begins the names of the scores that a filter by CLIP measures
LONG = 200  # characters of a text beside a picture
RECIPES = {"evqa": "E-VQA", "eic": "E-IC"}


def render_gallery(
    build: Build, found: Assembled, count: int, config: str, manifest: Mapping[str, Any]
) -> str:
    """The page.

    Args:
        build: with the reports of its stages.
        found: what was written.
        count: records to show, drawn by the build's seed; in the order of the files.
        config: as YAML text.
        manifest: of the run.
    """
    every = [(split, sample) for split, own in found.samples.items() for sample in own]
    draw = random.Random(seed_of(build.config.seed, "gallery"))
    chosen = sorted(draw.sample(range(len(every)), min(count, len(every))))
    encoded = Encoded(edge=EDGE)
    steps = [*build.reports, found.report()]
    return fill(
        "build.html",
        title=build.config.name,
        summary=summary(build, found),
        tiles=_tiles(steps, found),
        steps=[_step(step) for step in steps],
        rejections=rejection_lines(steps),
        defects=[
            f"{d.split}, record {d.record} ({d.id}): {d.kind}: {d.text}" for d in found.defects
        ],
        shown=DEFECTS,
        records=[
            _record(split, sample, build.pictures, encoded) for split, sample in _at(every, chosen)
        ],
        total=len(every),
        left_out=encoded.left_out,
        config=config,
        manifest=manifest,
    )


def summary(build: Build, found: Assembled) -> str:
    """One line: how many records of what, for which model."""
    splits = ", ".join(f"{len(own):,} {split}" for split, own in found.samples.items())
    kind = RECIPES.get(build.config.recipe, build.config.recipe)
    return f"{found.records:,} {kind} records for {build.config.model.name} ({splits or 'none'})"


def rejection_lines(steps: Sequence[StageReport]) -> list[tuple[str, str, str]]:
    """(stage, reason, samples), the stages in order and the most frequent reasons first."""
    lines = []
    for step in steps:
        counts = [(count, reason) for reason, count in step.rejected.items()]
        counts += [(count, f"{reason} (broken)") for reason, count in step.faults.items()]
        lines += [(step.name, reason, f"{count:,}") for count, reason in sorted(counts, key=_most)]
    return lines


def _most(counted: tuple[int, str]) -> tuple[int, str]:
    return -counted[0], counted[1]


def duration(seconds: float) -> str:
    """Seconds as people say them: "0.4 s", "3 min 20 s"."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _at(every: Sequence[Any], numbers: Sequence[int]) -> list[Any]:
    return [every[number] for number in numbers]


def _tiles(steps: Sequence[StageReport], found: Assembled) -> list[dict[str, Any]]:
    asked = next((step.samples for step in steps if step.slot == "select"), 0)
    faults = sum(sum(step.faults.values()) for step in steps)
    defects = len(found.defects)
    return [
        _tile("records", f"{found.records:,}", f"of {asked:,} that the model was asked"),
        _tile("pictures", f"{found.pictures:,}", "in the records"),
        _tile(
            "audit",
            f"{defects:,} defect{'s' if defects != 1 else ''}",
            "in the files and between them",
            -1 if defects else 1,
        ),
        _tile("faults", f"{faults:,}", "samples with something broken", -1 if faults else 0),
        _tile("time", duration(sum(step.seconds for step in steps)), "of all stages"),
    ]


def _tile(label: str, value: str, detail: str, sign: int = 0) -> dict[str, Any]:
    return {"label": label, "value": value, "detail": detail, "sign": sign}


def _step(step: StageReport) -> dict[str, Any]:
    return {
        "name": step.name,
        "by": step.by,
        "given": f"{step.samples:,}",
        "kept": f"{step.kept:,}",
        "share": round(100 * step.kept / step.samples) if step.samples else 0,
        "faults": f"{sum(step.faults.values()):,}",
        "seconds": duration(step.seconds) if step.seconds else "",
        "rate": f"{step.samples / step.seconds:,.1f}" if step.seconds else "",
    }


def _record(split: str, sample: Sample, pictures: Pictures, encoded: Encoded) -> dict[str, Any]:
    chosen = next((c for c in sample.candidates if c.image == sample.image_rephrase), None)
    turned_down = [c for c in sample.candidates if c.image != sample.image_rephrase]
    keeper, fact = sample.image_locality, sample.text_locality
    return {
        "id": sample.id,
        "split": split,
        "question": sample.question,
        "prediction": sample.prediction,
        "target": sample.target,
        "rephrase": sample.rephrase,
        "image": _uri(sample.image, pictures, encoded),
        "shows": _short(sample.captions[0] if sample.captions else sample.concept),
        "other": _uri(sample.image_rephrase, pictures, encoded),
        "origin": "" if chosen is None else chosen.origin,
        "prompt": "" if chosen is None else _short(chosen.prompt),
        "scores": "" if chosen is None else _scores(chosen.scores),
        "rejected": [_candidate(c, pictures, encoded) for c in turned_down[:REJECTED]],
        "more": max(0, len(turned_down) - REJECTED),
        "fact": _short_keeper(fact),
        "keeper": _short_keeper(keeper),
        "around": _uri(keeper.image, pictures, encoded) if keeper else "",
    }


def _candidate(candidate: Candidate, pictures: Pictures, encoded: Encoded) -> dict[str, Any]:
    return {
        "uri": _uri(candidate.image, pictures, encoded),
        "reason": _short(candidate.reason or "another one was better"),
        "scores": _scores(candidate.scores),
    }


def _short_keeper(keeper: Keeper | None) -> Keeper | None:
    if keeper is None:
        return None
    return replace(keeper, question=_short(keeper.question), answer=_short(keeper.answer))


def _short(text: str) -> str:
    return text if len(text) <= LONG else text[: LONG - 1].rstrip() + "…"


def _scores(scores: Mapping[str, float]) -> str:
    """Those of CLIP where there are any: "CLIP: text 0.31, image 0.72"."""
    clip = {n.removeprefix(CLIP): v for n, v in scores.items() if n.startswith(CLIP)}
    told = ", ".join(f"{name} {value:.2f}" for name, value in (clip or scores).items())
    return f"CLIP: {told}" if clip else told


def _uri(reference: str, pictures: Pictures, encoded: Encoded) -> str:
    """A picture as a data URI; "" where there is none to show (any more)."""
    try:
        return encoded.uri(pictures.load(reference)) if reference else ""
    except ImageProblem:
        return ""
