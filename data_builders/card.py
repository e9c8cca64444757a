"""The data card of a built set: README.md with the front matter that `datasets` reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_builders.gallery import rejection_lines, summary
from data_builders.stages.assemble import DATA, PICTURED
from editing.datasets import FIELDS
from mmtune.yaml_source import as_yaml

if TYPE_CHECKING:
    from data_builders.builds import Build, StageReport
    from data_builders.samples import Sample
    from data_builders.stages.assemble import Assembled, AssembleOptions

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"))
TASKS = {"evqa": "visual-question-answering", "eic": "image-to-text"}
ROLES = {"source": "edits", "text": "text locality", "image": "image locality"}
MEANING = {
    "src": "what the model is asked about `image`",
    "pred": "what it said",
    "alt": "the target: what it is to say",
    "rephrase": "`src` in other words; `alt` is right for it too",
    "image": "path of the image",
    "image_rephrase": "another image of the same; `alt` is right for it too",
    "loc": "a question about no image that must be answered as before",
    "loc_ans": "its answer",
    "m_loc": "an image of something else, which no record edits",
    "m_loc_q": "a question about it that must be answered as before",
    "m_loc_a": "its answer",
}
SKEWS = ("targets yes or no", "targets that are a number", "targets of one word")


def render_card(build: Build, found: Assembled, config: str, manifest: Mapping[str, Any]) -> str:
    """The card.

    Args:
        build: with the reports of its stages.
        found: what was written.
        config: as YAML text.
        manifest: of the run: versions, hashes of what was read, command.
    """
    options: AssembleOptions = build.config.assemble
    steps = [*build.reports, found.report()]
    parts = [
        f"# {build.config.name}",
        f"{summary(build, found)}. Each record is one thing that the model gets wrong, with what "
        "must change along with it and what must stay as it is. Made by `mmtune build`; look at "
        "some of them in gallery.html.",
        "## Files\n\n" + "\n".join(_files(found)),
        "## Fields\n\n" + "\n".join(f"- `{name}`: {MEANING[name]}" for name in FIELDS)
        + "\n- `id`: the sample's, in its source; what else is there, the source says",
        "## How it was made\n\n" + "\n".join(_steps(steps)),
        "## What was left out\n\n" + "\n".join(_left_out(steps)),
        "## Splits and leaks\n\n" + "\n".join(_leaks(found, options)),
        "## Sources and licences\n\n" + "\n".join(_licences(build, found)),
        "## Known limits\n\n" + "\n".join(f"- {line}" for line in _limits(build, found)),
        "## Made again\n\n" + "\n".join(_again(build, config, manifest, steps)),
    ]  # fmt: skip
    return _front(build, found, options) + "\n\n".join(parts) + "\n"


def _front(build: Build, found: Assembled, options: AssembleOptions) -> str:
    """What the Hub and `load_dataset` read."""
    front: dict[str, Any] = {
        "pretty_name": build.config.name,
        "language": options.language,
        "license": options.licence,
        "task_categories": [TASKS[build.config.recipe]] if build.config.recipe in TASKS else [],
        "tags": ["model-editing", "knowledge-editing", "multimodal"],
        "size_categories": [next((t for n, t in SIZES if found.records < n), "n>100K")],
    }
    splits = [split for split, own in found.samples.items() if own]
    ending = "-*.parquet" if found.parquet else ".json"
    files = [{"split": split, "path": f"{DATA}/{split}{ending}"} for split in splits]
    front |= {"configs": [{"config_name": "default", "data_files": files}]} if files else {}
    return f"---\n{as_yaml(front)}---\n\n"


def _files(found: Assembled) -> Iterator[str]:
    lines = [
        (f"{DATA}/{split}.json", len(own), len({s.image for s in own}),
         found.audits[split].fact("different targets"))
        for split, own in found.samples.items()
    ]  # fmt: skip
    yield from _table(("file", "records", "edit images", "different targets"), lines)
    yield ""
    inside = found.images.name == DATA
    where = (
        f"{DATA}/ ({DATA}/{PICTURED})" if inside else f"`{found.images}`, which is no part of it"
    )
    yield f"Image paths are relative to {where}; {found.pictures:,} different pictures."
    if found.parquet:
        yield "`datasets.load_dataset` of this folder reads the parquet files."


def _steps(steps: Sequence[StageReport]) -> Iterator[str]:
    lines = [(s.name, s.by, s.samples, s.kept, sum(s.faults.values())) for s in steps]
    yield from _table(("stage", "by", "given", "kept", "with something broken"), lines)
    for step in steps:
        if step.settings and step.slot not in ("source", "assemble"):
            text = as_yaml(dict(step.settings))
            by = f" ({step.by})" if step.by else ""
            yield f"\n{step.name}{by}:\n\n```yaml\n{text}```"


def _left_out(steps: Sequence[StageReport]) -> Iterator[str]:
    lines = rejection_lines(steps)
    if lines:
        yield from _table(("stage", "reason", "samples"), lines, numbers=1)
    else:
        yield "Nothing."


def _leaks(found: Assembled, options: AssembleOptions) -> Iterator[str]:
    same = "by their bytes" if options.check_images else "by their paths (images were not read)"
    yield (
        f"Records were split by image. Images were compared {same}: none is in two splits, whether "
        "as edit, generality or locality image; no locality image is edited or a generality image; "
        "no locality question is in two splits."
        if not found.defects
        else f"{len(found.defects):,} defects were found, so this set should not be used as it is:"
    )
    if found.defects:
        yield ""
        counts = Counter((d.split, d.kind) for d in found.defects)
        lines = [(split, kind, count) for (split, kind), count in sorted(counts.items())]
        yield from _table(("split", "defect", "count"), lines, numbers=1)
    unchecked = {kind for audit in found.audits.values() for kind in audit.unchecked}
    everywhere = [
        k for k in sorted(unchecked) if all(k in a.unchecked for a in found.audits.values())
    ]
    yield ""
    yield "`mmtune audit` was run on every file, against the training records."
    if everywhere:
        yield f"It did not look for: {', '.join(everywhere)}."


def _licences(build: Build, found: Assembled) -> Iterator[str]:
    for role, source in build.sources.items():
        licence = source.licence or "not stated; that of the files that were read"
        images = getattr(source.settings, "licence", "")
        told = f" Images: {images}." if images else ""
        of = ROLES.get(role, role)
        yield f"- Texts of {of}: source `{source.name}`. Licence: {licence}.{told}"
    counts = Counter(s.licence or "not stated" for own in found.samples.values() for s in own)
    several = ", ".join(f"{name} ({count:,})" for name, count in counts.most_common())
    yield f"- Images of the edits, records by licence: {several or 'none'}."
    origins = _origins(found)
    drawn = ", ".join(f"`{name}` ({count:,})" for name, count in origins.most_common())
    yield f"- Generality images by origin: {drawn or 'not stated'}."
    yield (
        f"- Predictions are those of `{build.config.model.name}`. Texts and pictures that a model "
        "made fall under that model's licence; the settings above name the models."
    )


def _limits(build: Build, found: Assembled) -> Iterator[str]:
    steady = any(report.settings.get("answer") == "model" for report in build.reports)
    yield (
        f"Predictions{' and locality answers' if steady else ''} are of "
        f"`{build.config.model.name}` alone: for another model, build again, or some records have "
        "nothing to edit."
    )
    yield "Targets are what the source says, agreed by a rule; nobody looked at each record."
    if found.records:
        yield "Rephrases and generality images passed the checks above, not the eyes of a person."
    if "pairs" in _origins(found):
        yield (
            "Generality images from `pairs` are other pictures of the same thing, not other views "
            "of the same scene."
        )
    for name in SKEWS:
        parts = [(a.fact(name), a.records, split) for split, a in found.audits.items()]
        told = ", ".join(f"{value:,} of {count:,} ({split})" for value, count, split in parts)
        yield f"{name[0].upper()}{name[1:]}: {told}."
    if build.config.recipe == "evqa":
        yield "Several records may share an image: resample by image for intervals."


def _again(
    build: Build, config: str, manifest: Mapping[str, Any], steps: Sequence[StageReport]
) -> Iterator[str]:
    versions = {n: v for step in steps for n, v in step.versions.items()}
    versions |= manifest.get("versions", {})
    yield f"- command: `{manifest.get('command', 'mmtune build config.yaml')}`"
    yield f"- seed: {build.config.seed}; every sample's own seed follows from it and its id"
    if versions:
        yield f"- versions: {', '.join(f'{n} {v}' for n, v in sorted(versions.items()))}"
    if manifest.get("git_commit"):
        yield f"- commit: {manifest['git_commit']}"
    for path, file in manifest.get("data", {}).items():
        name = Path(path).name  # where it was on this machine is nobody's affair
        yield f"- read: {name} ({file['bytes']:,} bytes, sha256 {file['sha256']})"
    yield f"\n<details><summary>Config</summary>\n\n```yaml\n{config.rstrip()}\n```\n\n</details>"


def _origins(found: Assembled) -> Counter[str]:
    return Counter(_origin(s) for own in found.samples.values() for s in own)


def _origin(sample: Sample) -> str:
    chosen = (c.origin for c in sample.candidates if c.image == sample.image_rephrase)
    return next(chosen, "the source")


def _table(
    header: Sequence[str], lines: Sequence[Sequence[Any]], numbers: int | None = None
) -> Iterator[str]:
    """A table of markdown; the last `numbers` columns (None: those with numbers) stand right."""
    right = [
        i >= len(header) - numbers
        if numbers is not None
        else bool(lines) and isinstance(lines[0][i], int)
        for i in range(len(header))
    ]
    yield f"| {' | '.join(header)} |"
    yield f"|{'|'.join('---:' if is_right else '---' for is_right in right)}|"
    for line in lines:
        yield f"| {' | '.join(_cell(value) for value in line)} |"


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")
