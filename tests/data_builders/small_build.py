"""A build whose source, stages, join and files are small and quick, and which dies on demand."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from data_builders.builds import StageReport
from data_builders.samples import Candidate, Keeper, Rejected, Sample
from data_builders.sources.base import Source
from data_builders.stages.base import Stage

OPENED: list[str] = []  # stages that were opened in this process

CONFIG = """\
name: small
seed: 3
recipe: evqa
model: {name: "test:none", device: cpu}
source: {format: numbers, path: PATH, count: 13}
pools:
  text: {format: numbers, count: 5}
  image: {format: numbers, count: 4}
stages:
  select: {by: keen}
  rephrase: {by: shout}
  imagine: {by: draw}
  filter: {by: pick}
  consistent: {by: steady}
shard_size: 3
"""


@dataclass(frozen=True)
class NumbersOptions:
    count: int = 0
    path: str = ""
    broken: list[int] = field(default_factory=list)


class Numbers(Source[NumbersOptions]):
    name, options = "numbers", NumbersOptions

    def roots(self):
        return {}

    def files(self):
        return [self.settings.path] if self.settings.path else []

    def read(self, pictures):
        for number in range(self.settings.count):
            event("read")
            if number in self.settings.broken:
                yield Rejected(f"n{number}", "broken record", "no question", fault=True)
            else:
                yield Sample(f"n{number}", f"what is {number}?", answers=(str(number),))


@dataclass(frozen=True)
class SmallOptions:
    """`reject`: ids that are of no use; `broken`: ids that are faults; `fail`: one that raises."""

    word: str = "a"
    reject: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    fail: str = ""
    kill: str = ""
    full: str = ""


class Small(Stage[SmallOptions]):
    options = SmallOptions

    def open(self):
        OPENED.append(self.name)
        if self.settings.word == "closed":
            raise ValueError("word is closed. Take another.")

    def run(self, samples):
        return [self._one(sample) for sample in samples]

    def _one(self, sample):
        event(self.slot)
        time.sleep(float(os.environ.get("SECONDS_A_SAMPLE", "0")))  # so that it can be stopped
        given = self.settings
        if sample.id == given.fail:
            raise ZeroDivisionError("by zero")
        if sample.id == given.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if sample.id == given.full:
            raise OSError(28, "No space left on device")
        if sample.id in given.broken:
            return Rejected(sample.id, "unreadable", f"{sample.id} is", fault=True)
        if sample.id in given.reject or self.rejects(sample):
            return Rejected(sample.id, "of no use")
        return self.grown(sample)

    def rejects(self, sample):
        return False

    def grown(self, sample):
        return sample


class Keen(Small):
    slot, name = "select", "keen"

    def rejects(self, sample):
        return int(sample.id[1:]) % 5 == 1

    def grown(self, sample):
        draw = self.context.seed_of("select", sample.id) % 1000
        return sample.with_(target=sample.answers[0], prediction=f"{self.settings.word}{draw}")


class Shout(Small):
    slot, name = "rephrase", "shout"

    def grown(self, sample):
        return sample.with_(rephrase=sample.question.upper() + " \u2028é")


class Draw(Small):
    slot, name = "imagine", "draw"

    def grown(self, sample):
        seed = self.context.seed_of("imagine", sample.id)
        image = self.context.pictures.save(f"imagine/{sample.id}.png", str(seed).encode())
        return sample.with_(candidates=(Candidate(image, "p", "draw", seed, {"clip": 0.25}),))


class Pick(Small):
    slot, name = "filter", "pick"

    def rejects(self, sample):
        return sample.id == "n7"

    def grown(self, sample):
        return sample.with_(image_rephrase=sample.candidates[0].image)


class Steady(Small):
    slot, name = "consistent", "steady"

    def rejects(self, sample):
        return sample.id == "n2"

    def grown(self, sample):
        return sample.with_(prediction="same")


def stages():
    return {one.slot: {one.name: one} for one in (Keen, Shout, Draw, Pick, Steady)}


def sources():
    return {"numbers": Numbers}


@dataclass(frozen=True)
class LocalityOptions:
    word: str = "a"


def join(samples, text, image, seed, settings, pictures):
    assert pictures.roots["made"].is_absolute()
    found = []
    for number, sample in enumerate(samples):
        event("locality")
        if sample.id == "n10":
            found.append(Rejected(sample.id, "no keeper"))
            continue
        one, other = text[(number + seed) % len(text)], image[number % len(image)]
        found.append(
            sample.with_(
                text_locality=Keeper(one.question, one.prediction, id=one.id),
                image_locality=Keeper(other.question, settings.word, "made:x", other.id),
            )
        )
    return found


@dataclass(frozen=True)
class AssembleOptions:
    word: str = "a"


@dataclass(frozen=True)
class Assembled:
    kept: list
    rejected: list
    defects: list

    def report(self):
        given = len(self.kept) + len(self.rejected)
        faults = {"unreadable": len(self.rejected)} if self.rejected else {}
        return StageReport("assemble", "assemble", "", {}, given, len(self.kept), {}, faults)


def assemble(build, samples):
    event("assemble")
    folder = build.folder / "data"
    folder.mkdir(exist_ok=True)
    (folder / "train.json").write_text(json.dumps([sample.as_json() for sample in samples]))
    event("assemble")
    counts = [(r.name, r.samples, r.kept) for r in build.reports]
    (build.folder / "README.md").write_text(json.dumps(counts))
    return Assembled(list(samples), [], [])


class Deaths:
    """Counts what happens; at the number `at` this process is killed."""

    at = -1
    seen = 0
    names: list[str] | None = None  # of all so far, where somebody wants to know


def event(name):
    if Deaths.names is not None:
        Deaths.names.append(name)
    if Deaths.seen == Deaths.at:
        os.kill(os.getpid(), signal.SIGKILL)
    Deaths.seen += 1


def install(patch=setattr):
    """Put the small parts in the places of the real ones."""
    import data_builders.sources
    import data_builders.stages
    import data_builders.stages.assemble as files
    import data_builders.stages.locality as locality

    patch(data_builders.stages, "stages", stages)
    patch(data_builders.sources, "sources", sources)
    patch(files, "assemble", assemble)
    patch(files, "AssembleOptions", AssembleOptions)
    patch(locality, "LocalityOptions", LocalityOptions)
    patch(locality, "join", join)


def run(config, runs, overrides=(), **options):
    """Build in this process."""
    from data_builders.config import load_build_config
    from data_builders.pipeline import build

    return build(load_build_config(config, overrides), Path(runs), command=["mmtune"], **options)


def write_config(folder):
    """The config in a folder; the file that its source names is beside it."""
    (folder / "numbers.txt").write_text("numbers")
    path = folder / "small.yaml"
    path.write_text(CONFIG.replace("PATH", str(folder / "numbers.txt")))
    return path


def die(config, runs, at, overrides=(), names=None):
    """Build in this process, which is killed at event number `at`: a sample, or part of a write.

    Args:
        at: -1 lives.
        names: a file that gets the names of all events.
    """
    os.environ["TQDM_DISABLE"] = "1"
    install()
    write, replace = os.fsync, os.replace
    path_replace = Path.replace

    def fsync(descriptor):
        event("before fsync")
        write(descriptor)

    def moved(source, target):
        event("before rename")
        replace(source, target)
        event("after rename")

    def path_moved(source, target):
        event("before rename")
        path_replace(source, target)
        event("after rename")

    os.fsync, os.replace, Path.replace = fsync, moved, path_moved
    Deaths.at, Deaths.names = at, []
    run(config, runs, overrides)
    if names is not None:
        Path(names).write_text("\n".join(Deaths.names))


def contents(folder):
    """Every file of a build by its path, without what says when and how long."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = _content(path)
    return found


def _content(path):
    if path.name != "manifest.json":
        return path.read_bytes()
    raw = json.loads(path.read_text())
    return {k: v for k, v in raw.items() if k not in ("started", "seconds", "git_commit")}


if __name__ == "__main__":
    install()
    run(sys.argv[1], sys.argv[2], sys.argv[3:])
