"""Look at a file of edit records and count what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from editing.audit import rephrases
from editing.audit.kinds import KINDS, LONG, Finding
from editing.datasets import IMAGES, PORTABILITY, TEXTS, faults_of, load_items
from mmtune.data.checking import faults
from mmtune.data.readers.json_files import load_json, wrong_shape
from mmtune.data.records import DataError, ImageFile, Problem

Items = Mapping[int, Mapping[str, Any]]  # well-formed items by their number in the file
SHARED = ("edit shared", "edit image shared", "image locality shared", "text locality shared")
ON_DISK = ("missing image", "broken image")
UNUSUAL = "locality answer is not the usual one"


@dataclass(frozen=True)
class Fact:
    """A number about a file that is no defect of one record: `value` of `of`, where that is set."""

    name: str
    value: int
    of: int | None = None


@dataclass(frozen=True)
class Audit:
    """What was found in a file.

    Attributes:
        path: the file.
        records: how many items it has, good and bad.
        findings: every defect of every record, by kind in the order of `KINDS`.
        facts: numbers about the whole file.
        unchecked: kinds that were not looked for, and what they need.
        options: what else was read: the other file, the folder of images, the locality pool.
    """

    path: str
    records: int
    findings: list[Finding]
    facts: list[Fact]
    unchecked: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)

    def having(self, kind: str) -> list[int]:
        """Numbers of the records that have a kind of defect."""
        return list(dict.fromkeys(f.record for f in self.findings if f.kind == kind))

    def counts(self) -> dict[str, int]:
        """Kind that was looked for -> number of records that have it."""
        return {k: len(self.having(k)) for k in KINDS if k not in self.unchecked}

    def fact(self, name: str) -> int:
        """The value of the fact of this name."""
        return next(f.value for f in self.facts if f.name == name)

    def as_json(self, examples: int = 3) -> dict[str, Any]:
        """The audit as JSON: every kind with its records, facts, and what was not looked for."""
        defects = {
            kind: {
                "records": len(having),
                "meaning": KINDS[kind].meaning,
                "fix": KINDS[kind].fix,
                "in": having,
                "examples": [vars(f) for f in self.findings if f.kind == kind][:examples],
            }
            for kind in self.counts()
            for having in [self.having(kind)]
        }
        return {
            "file": self.path,
            **self.options,
            "records": self.records,
            "defects": defects,
            "facts": {f.name: {"value": f.value, "of": f.of} for f in self.facts},
            "not_looked_for": self.unchecked,
        }


def audit(
    path: str,
    against: str | None = None,
    images: str | None = None,
    pool: str | None = None,
    progress: bool = True,
) -> Audit:
    """Find every defect in a file of edit records.

    Args:
        path: the file.
        against: another file of edit records, such as the one that an editor was trained on.
        images: folder of the images, of which each is decoded once; None leaves them out.
        pool: file of locality questions with all their answers: a list of {question, answer: list
            of texts, image}.
        progress: draw a progress bar over the images.

    Raises:
        DataError: a file that is missing or not what it should be.
    """
    items = load_items(path)
    good, findings = sorted_out(items)
    findings += [f for n, item in good.items() for f in record_findings(n, item)]
    findings += duplicates(good)
    edited = {item["image"] for item in good.values()}
    findings += [
        Finding("locality image is edited", n, "m_loc", repr(item["m_loc"]))
        for n, item in good.items()
        if item["m_loc"] in edited
    ]
    facts = _facts(good, len(items))
    unchecked: dict[str, str] = {}
    if against is None:
        unchecked |= dict.fromkeys(SHARED, "--against FILE")
    else:
        other, _ = sorted_out(load_items(against))
        findings += _shared(good, other)
        facts += _shared_facts(good, other)
    if images is None:
        unchecked |= dict.fromkeys(ON_DISK, "--images DIR")
    else:
        wrong = image_findings(good, images, progress)
        findings += wrong
        every = {item[name] for item in good.values() for name in IMAGES}
        bad = {good[f.record][f.field] for f in wrong}
        facts.append(Fact("images that are missing or broken", len(bad), len(every)))
    if pool is None:
        unchecked[UNUSUAL] = "--pool FILE"
    else:
        answers, pictures = _pool(pool)
        findings += _unusual(good, answers)
        facts += _pool_facts(good, answers, pictures)
    order = list(KINDS)
    findings.sort(key=lambda f: (order.index(f.kind), f.record))
    options = {"against": against, "images": images, "pool": pool}
    return Audit(
        path, len(items), findings, facts, unchecked, {k: v for k, v in options.items() if v}
    )


def sorted_out(items: Sequence[Any]) -> tuple[dict[int, dict[str, Any]], list[Finding]]:
    """The items whose other defects can be looked for, by number, and why others cannot.

    An item with nothing to edit is well-formed: it is among both.
    """
    good, findings = {}, []
    for number, item in enumerate(items):
        found = [Finding(f.reason, number, f.field, f.text) for f in faults_of(item)]
        findings += found
        if all(f.kind == "nothing to edit" for f in found):
            good[number] = item
    return good, findings


def texts_of(item: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(name for messages, the mapping that has it, its key) of every text of a well-formed item."""
    hops = item.get(PORTABILITY, ())
    places: list[tuple[str, Any]] = [("", item)]
    places += [(f"{PORTABILITY}[{i}].", hop) for i, hop in enumerate(hops)]
    for prefix, place in places:
        names = ("port_edit_q", "port_edit_a", "port_q", "port_a") if prefix else TEXTS
        for name in names:
            if isinstance(place.get(name), str):
                yield prefix + name, place, name


def record_findings(number: int, item: Mapping[str, Any]) -> list[Finding]:
    """The defects that a well-formed item has by itself."""
    found: list[tuple[str, str, str]] = []
    rephrase, source, pred = item["rephrase"], item["src"], item.get("pred", "")
    words = len(rephrase.split())
    for kind in rephrases.defects(rephrase, source):
        found.append((kind, "rephrase", repr(rephrase)))
    if words > LONG:
        found.append(("long rephrase", "rephrase", f"{words} words: {rephrase!r}"))
    if item["image_rephrase"] == item["image"]:
        found.append(("image rephrase is the image", "image_rephrase", repr(item["image"])))
    for name, place, key in texts_of(item):
        if place[key] != place[key].strip():
            found.append(("outer blanks", name, repr(place[key])))
    if "_" in pred:
        found.append(("graph name as prediction", "pred", repr(pred)))
    for i, hop in enumerate(item.get(PORTABILITY, ())):
        if hop.get("port_edit_a", hop["port_a"]) != hop["port_a"]:
            text = f"{hop['port_edit_a']!r} without the image, {hop['port_a']!r} with it"
            found.append(("two answers to one hop", f"{PORTABILITY}[{i}]", text))
    return [Finding(kind, number, name, text) for kind, name, text in found]


def duplicates(good: Items) -> list[Finding]:
    """Items that edit what an earlier one edits."""
    first: dict[tuple[str, str], int] = {}
    found = []
    for number, item in good.items():
        at = first.setdefault((item["image"], item["src"]), number)
        if at != number:
            same = "the same" if good[at]["alt"] == item["alt"] else "another"
            text = f"as record {at}, with {same} target: {item['src']!r}, {item['image']!r}"
            found.append(Finding("duplicate edit", number, "src", text))
    return found


def image_findings(good: Items, folder: str, progress: bool) -> list[Finding]:
    """Images that are absent, do not decode, or lie outside their folder."""
    files = {item[name]: ImageFile(folder, item[name]) for item in good.values() for name in IMAGES}
    wrong = faults(files.values(), progress, folder)
    return [
        Finding(
            "missing image" if fault.reason == "missing image" else "broken image",
            number,
            name,
            fault.text if fault.reason == "missing image" else str(fault),
        )
        for number, item in good.items()
        for name in IMAGES
        if (fault := wrong[files[item[name]]]) is not None
    ]


def _shared(good: Items, other: Items) -> list[Finding]:
    found = []
    for kind, fields in zip(
        SHARED, (("image", "src"), ("image",), ("m_loc", "m_loc_q"), ("loc",)), strict=True
    ):
        known = {tuple(item[f] for f in fields): n for n, item in reversed([*other.items()])}
        for number, item in good.items():
            key = tuple(item[f] for f in fields)
            if key in known:
                text = f"record {known[key]} there: {', '.join(map(repr, key))}"
                found.append(Finding(kind, number, fields[0], text))
    return found


def _facts(good: Items, records: int) -> list[Fact]:
    every = list(good.values())
    edited = {item["image"] for item in every}
    targets = [item["alt"].strip() for item in every]
    around = Counter((item["m_loc"], item["m_loc_q"]) for item in every)
    folders = [tuple(PurePosixPath(item[n]).parent for n in IMAGES[:2]) for item in every]
    total = len(every)
    return [
        Fact("well-formed records", total, records),
        Fact("different edit images", len(edited), total),
        Fact("folders of edit images", len({own for own, _ in folders}), total),
        Fact("both images in one folder", sum(own == other for own, other in folders), total),
        Fact("different targets", len({item["alt"] for item in every}), total),
        Fact("targets yes or no", sum(t.casefold() in ("yes", "no") for t in targets), total),
        Fact("targets that are a number", sum(t.isdecimal() for t in targets), total),
        Fact("targets of one word", sum(len(t.split()) == 1 for t in targets), total),
        Fact("different rephrases", len({item["rephrase"] for item in every}), total),
        Fact("different image-locality pairs", len(around), total),
        Fact("locality images that are edit images", len({i["m_loc"] for i in every} & edited)),
    ]


def _shared_facts(good: Items, other: Items) -> list[Fact]:
    def count(items: Iterable[Mapping[str, Any]], *fields: str) -> int:
        known = {tuple(item[f] for f in fields) for item in other.values()}
        return sum(tuple(item[f] for f in fields) in known for item in items)

    every = list(good.values())
    once = {item["image"]: item for item in every}
    aligned = sum(
        n in other and (item["m_loc"], item["m_loc_q"]) == (other[n]["m_loc"], other[n]["m_loc_q"])
        for n, item in good.items()
    )
    return [
        Fact("edit images that the other file has too", count(once.values(), "image"), len(once)),
        Fact("records whose src is there too", count(every, "src"), len(every)),
        Fact("records there with the same target", count(every, "image", "src", "alt"), len(every)),
        Fact("records whose image locality has the same number there", aligned, len(every)),
    ]


def _pool(path: str) -> tuple[dict[tuple[str, str], list[str]], set[str]]:
    """(image, question) -> the annotators' answers; and all images of the pool."""
    document = load_json(path)
    if not isinstance(document, list):
        raise wrong_shape(path, "a list of {question, answer, image}", document)
    answers: dict[tuple[str, str], list[str]] = {}
    for number, item in enumerate(document):
        entry = item if isinstance(item, dict) else {}
        image, question, given = (entry.get(k) for k in ("image", "question", "answer"))
        texts = given if isinstance(given, list) else []
        if not (texts and all(isinstance(value, str) for value in (image, question, *texts))):
            text = "expected {question: text, answer: list of texts, image: path}"
            raise DataError([Problem(f"{path}, record {number}", "malformed record", text)])
        answers.setdefault((str(image), str(question)), []).extend(texts)
    return answers, {image for image, _ in answers}


def _usual(answers: list[str]) -> str:
    return Counter(answers).most_common(1)[0][0]


def _unusual(good: Items, answers: Mapping[tuple[str, str], list[str]]) -> list[Finding]:
    found = []
    for number, item in good.items():
        given = answers.get((item["m_loc"], item["m_loc_q"]))
        if given and (usual := _usual(given)) != item["m_loc_a"]:
            text = f"{item['m_loc_a']!r} ({given.count(item['m_loc_a'])} of {len(given)}), most "
            text += f"said {usual!r} ({given.count(usual)})"
            found.append(Finding(UNUSUAL, number, "m_loc_a", text))
    return found


def _pool_facts(
    good: Items, answers: Mapping[tuple[str, str], list[str]], pictures: set[str]
) -> list[Fact]:
    every = list(good.values())
    given = [answers.get((item["m_loc"], item["m_loc_q"]), []) for item in every]
    pairs = list(zip([item["m_loc_a"] for item in every], given, strict=True))
    known = sum(answer in texts for answer, texts in pairs)
    usual = sum(bool(texts) and answer == _usual(texts) for answer, texts in pairs)
    edited = {item["image"] for item in every}
    return [
        Fact("image localities that are in the pool", sum(map(bool, given)), len(every)),
        Fact("of which the answer is an annotator's", known, len(every)),
        Fact("of which the answer is the usual one", usual, len(every)),
        Fact("images of the pool that are edit images", len(pictures & edited), len(pictures)),
    ]
