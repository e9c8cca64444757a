"""The kinds of defects: what each means and what a clean copy does about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mmtune.suggestions import did_you_mean

Fix = Literal["mended", "left out", "stays"]


@dataclass(frozen=True)
class Kind:
    """One kind of defect.

    Attributes:
        name: what it is called everywhere.
        meaning: when a record has it, or what follows from it.
        fix: what the clean copy does: the text is "mended", the record is "left out", or it "stays"
            because only other data or another model could mend it.
    """

    name: str
    meaning: str
    fix: Fix


@dataclass(frozen=True)
class Finding:
    """A defect of one record.

    Attributes:
        kind: name of its kind.
        record: number of the record in the file, from 0.
        field: the field that has it.
        text: what exactly.
    """

    kind: str
    record: int
    field: str
    text: str


LONG = 25  # words of a rephrase
UNREADABLE = ("malformed record", "missing field", "empty field", "empty target")

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("malformed record", "no mapping, or a field that is no text", "left out"),
        Kind("missing field", "one of the fields is absent", "left out"),
        Kind("empty field", "a text or path that is blank", "left out"),
        Kind("empty target", "alt is blank", "left out"),
        Kind("nothing to edit", "alt is pred, but for case, blanks and a full stop", "left out"),
        Kind("missing image", "no such file in the folder of images", "left out"),
        Kind("broken image", "a file that does not decode or lies outside the folder", "left out"),
        Kind("duplicate edit", "image and src of an earlier record", "left out"),
        Kind("rephrase equals src", "its text generality is plain reliability", "left out"),
        Kind(
            "image rephrase is the image", "its image generality is plain reliability", "left out"
        ),
        Kind("refusal", "the rephrase is a language model's apology", "left out"),
        Kind("rephrase in quotes", "its first and last character are double quotes", "mended"),
        Kind("several rephrases", "a line break inside: candidates in one string", "mended"),
        Kind("talk around the rephrase", 'such as: "src" can be rewritten as "..."', "mended"),
        Kind("outer blanks", "a text begins or ends with white space", "mended"),
        Kind("long rephrase", f"over {LONG} words", "stays"),
        Kind("graph name as prediction", "pred has underscores: no model said it", "stays"),
        Kind("two answers to one hop", "port_edit_a differs from port_a", "stays"),
        Kind(
            "locality image is edited",
            "m_loc is an edit image: in sequential editing it is not out of scope",
            "stays",
        ),
        Kind("edit shared", "image and src of a record of the other file", "stays"),
        Kind("edit image shared", "an edit image of the other file", "stays"),
        Kind(
            "image locality shared",
            "m_loc and m_loc_q are in the other file: an editor trained on it has learned to keep "
            "just these",
            "stays",
        ),
        Kind("text locality shared", "loc is in the other file", "stays"),
        Kind(
            "locality answer is not the usual one",
            "m_loc_a is not what most annotators said (the first of equals)",
            "stays",
        ),
    )
}


def named(names: Iterable[str]) -> frozenset[str]:
    """Kinds by name; hyphens may stand for blanks.

    Raises:
        ValueError: no such kind; one that a clean copy leaves as it is anyway; or one that makes a
            record unreadable, which a clean copy never has.
    """
    found = set()
    choice = [k.name for k in KINDS.values() if k.fix != "stays" and k.name not in UNREADABLE]
    for name in names:
        plain = name.replace("-", " ").strip().lower()
        if plain not in choice:
            hint = did_you_mean(plain, choice)
            raise ValueError(f"--keep {name!r}: expected one of {', '.join(choice)}.{hint}")
        found.add(plain)
    return frozenset(found)
