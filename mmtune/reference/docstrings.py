"""Google-style docstrings taken apart: text, equations, counts, sections."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

SECTIONS = (
    "Args", "Attributes", "Buffers", "Parameters", "Raises", "Returns", "Shape", "Source", "Units",
)  # fmt: skip
COUNTS = ("Trainable parameters", "Numbers changed")
_SECTION = re.compile(rf"({'|'.join(SECTIONS)}):")
_ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)")


@dataclass(frozen=True)
class Block:
    """A paragraph, or an equation whose lines stay as they are."""

    text: str
    equation: bool = False


@dataclass(frozen=True)
class Docs:
    """What a docstring says.

    Attributes:
        summary: its first line.
        body: what follows, without counts and sections.
        count: the paragraph that begins with one of COUNTS.
        source: the section or paragraph of that name.
        options: name -> text of the section Args or Attributes.
    """

    summary: str = ""
    body: Sequence[Block] = ()
    count: str = ""
    source: str = ""
    options: dict[str, str] = field(default_factory=dict)

    @property
    def equations(self) -> list[str]:
        """The indented paragraphs."""
        return [block.text for block in self.body if block.equation]


def parse(docstring: str | None) -> Docs:
    """Take a docstring apart; an empty one says nothing."""
    body, sections = _sections(inspect.cleandoc(docstring or ""))
    blocks = list(_blocks(body))
    count, source, kept = "", _flowing(sections.get("Source", [])), []
    for block in blocks[1:]:
        if not block.equation and block.text.startswith(COUNTS):
            count = block.text
        elif not block.equation and block.text.startswith("Source: "):
            source = block.text.removeprefix("Source: ")
        else:
            kept.append(block)
    options = _entries([*sections.get("Args", []), *sections.get("Attributes", [])])
    return Docs(blocks[0].text if blocks else "", kept, count, source, options)


def option_texts(cls: type) -> dict[str, str]:
    """Name of each field of a dataclass -> what its docstring, or that of a base, says of it."""
    known = [parse(own) for base in cls.__mro__ if (own := base.__dict__.get("__doc__"))]
    found = {}
    for name in getattr(cls, "__dataclass_fields__", {}):
        more = ""
        for docs in known:
            text = docs.options.get(name, "")
            if text.startswith("see `"):  # a base has it; what follows may be of this option
                rest = text.partition("`")[2].partition("`")[2].strip(" .;")
                more = f" {rest[0].upper()}{rest[1:]}." if name in rest.split() else more
            elif text:
                found[name] = text + more
                break
    return found


def _sections(text: str) -> tuple[list[str], dict[str, list[str]]]:
    """The lines before the sections, and the lines of each section without their indent."""
    body: list[str] = []
    found: dict[str, list[str]] = {}
    into = body
    for line in text.splitlines():
        heading = _SECTION.fullmatch(line)
        if heading:
            into = found.setdefault(heading[1], [])
        elif line and not line.startswith(" ") and into is not body:
            into = body
            into.append(line)
        else:
            into.append(line)
    return body, {n: textwrap.dedent("\n".join(own)).splitlines() for n, own in found.items()}


def _blocks(lines: Sequence[str]) -> Iterator[Block]:
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        if not paragraph.strip():
            continue
        own = paragraph.splitlines()
        if all(line.startswith("    ") for line in own):
            yield Block(textwrap.dedent(paragraph).rstrip(), equation=True)
        else:
            yield Block(_flowing(own))


def _entries(lines: Sequence[str]) -> dict[str, str]:
    """Name -> its text, of lines such as "a, b: text" and the indented ones below."""
    found: dict[str, list[str]] = {}
    names: list[str] = []
    for line in lines:
        entry = None if line.startswith(" ") else _ENTRY.fullmatch(line)
        if entry:
            names = entry[1].split(", ")
            found |= {name: [entry[2]] for name in names}
        else:
            for name in names:
                found[name].append(line)
    return {name: _flowing(own) for name, own in found.items()}


def _flowing(lines: Sequence[str]) -> str:
    return " ".join(line.strip() for line in lines if line.strip())
