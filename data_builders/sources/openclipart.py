"""Open Clip Art drawings, as Debian's openclipart-svg and openclipart-png packages install them.

An SVG file carries title, keywords, description, author and licence (RDF in its `metadata`); the
PNG of the same relative path is the picture. Neither the words nor the pictures were made for
learning: a third of the titles name a collection, file names are cut off and carry the author,
and many titles are Italian. This module turns one record into plain text, always the same way.
"""

from __future__ import annotations

import html
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_builders.sources.openclipart_words import (
    FOLDER_JUNK,
    GLOSSARY,
    ICON_PARTS,
    KEYWORD_JUNK,
    RANKS,
    RESPELL,
    SUBJECTS,
    SUITS,
    TITLE_JUNK,
)

_DC = "{http://purl.org/dc/elements/1.1/}"
_BY_AUTHOR = re.compile(r"^\s*clipart by [^-]* - ", re.IGNORECASE)
_SHORT = 12  # words of a description that a caption takes whole
_FOREIGN = r"@|https?:|www\.|HASH\(|converted|released|collection|distributed|derived"
_SHARED = 3  # drawings that share a title foreign to their file names: it names a collection
_MAX_BYTES = 32 * 2**20


class BrokenDrawing(ValueError):
    """An SVG file that cannot be read; the message names the file and the cause."""


@dataclass(frozen=True)
class RawDrawing:
    """What the SVG file says, untouched. `path` is relative to the root, with slashes."""

    path: str
    title: str
    keywords: tuple[str, ...]
    description: str
    creator: str
    licence: str


@dataclass(frozen=True)
class DrawingText:
    """Plain English text of one drawing, lower-cased."""

    title: str
    keywords: tuple[str, ...]
    description: str
    caption: str


def read_drawing(root: Path, path: Path) -> RawDrawing:
    """Read one SVG file's metadata.

    Args:
        root: folder that holds the categories.
        path: the SVG file, below `root`.

    Raises:
        BrokenDrawing: not well-formed XML, no SVG, or larger than 32 MiB.
    """
    relative = path.relative_to(root).as_posix()
    if path.stat().st_size > _MAX_BYTES:
        raise BrokenDrawing(f"{relative}: larger than {_MAX_BYTES} bytes")
    try:
        tree = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise BrokenDrawing(f"{relative}: not well-formed XML ({error})") from error
    if not tree.tag.endswith("svg"):
        raise BrokenDrawing(f"{relative}: the root element is {tree.tag!r}, expected svg")
    work = next((node for node in tree.iter() if node.tag.endswith("}Work")), None)
    if work is None:
        return RawDrawing(relative, "", (), "", "", "")
    licence = next((node for node in work.iter() if node.tag.endswith("}license")), None)
    items = [n for s in work.findall(f"{_DC}subject") for n in s.iter() if n.tag.endswith("}li")]
    return RawDrawing(
        path=relative,
        title=_text(work.find(f"{_DC}title")),
        keywords=tuple(_text(item) for item in items),
        description=_text(work.find(f"{_DC}description")),
        creator=_text(work.find(f"{_DC}creator")),
        licence="" if licence is None else " ".join(licence.attrib.values()),
    )


def is_public_domain(drawing: RawDrawing) -> bool:
    """Whether the file itself says so (a few say GPL, some say nothing)."""
    return "publicdomain" in drawing.licence.lower().replace(" ", "")


def describe(drawings: Sequence[RawDrawing]) -> list[DrawingText | None]:
    """Text for every drawing; None where nothing usable is left.

    All drawings are needed at once: a title counts as a collection's when several drawings share
    it whose file names are something else.

    Args:
        drawings: n raw records.

    Returns:
        n texts, in the order of `drawings`.
    """
    collections = _collection_titles(drawings)
    texts = [_describe(drawing, collections) for drawing in drawings]
    titles = {text.title for text in texts if text is not None}
    seen_in = Counter(word for title in titles for word in set(title.split()))
    return [
        None if text and _is_jargon(drawing.path, text.title, seen_in) else text
        for drawing, text in zip(drawings, texts, strict=True)
    ]


def normalise(text: str) -> str:
    """The form in which two texts count as the same: letters only, no digits, single spaces."""
    return " ".join(re.findall(r"[a-z]+", _ascii(text).lower()))


def _is_jargon(path: str, title: str, seen_in: Counter[str]) -> bool:
    """Whether an icon is named only by words that no other title uses ("kcmdf icon")."""
    if not path.startswith("computer/icons/"):
        return False
    return all(
        seen_in[word] < 2 and word not in ICON_PARTS for word in title.split() if word != "icon"
    )


def _text(node: ElementTree.Element | None) -> str:
    return "" if node is None else html.unescape(" ".join("".join(node.itertext()).split()))


def _ascii(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")


def _squeeze(text: str) -> str:
    return re.sub(r"[^a-z]+", "", _ascii(text).lower())


def _collection_titles(drawings: Iterable[RawDrawing]) -> frozenset[str]:
    """Titles (squeezed) that name a collection: shared, and not what the files are called."""
    stems: defaultdict[str, Counter[bool]] = defaultdict(Counter)
    for drawing in drawings:
        title = _squeeze(_BY_AUTHOR.sub("", drawing.title))
        stem = _squeeze(PurePosixPath(drawing.path).stem)
        stems[title][bool(title) and (stem.startswith(title[:6]) or title[:12] in stem)] += 1
    return frozenset(t for t, found in stems.items() if found[False] >= _SHARED)


def _describe(drawing: RawDrawing, collections: frozenset[str]) -> DrawingText | None:
    folder = PurePosixPath(drawing.path).parent
    title = _title(drawing, collections, folder)
    if not title:
        return None
    keywords = _keywords(drawing, folder)
    description = _description(drawing)
    return DrawingText(title, keywords, description, _caption(title, keywords, description))


def _title(drawing: RawDrawing, collections: frozenset[str], folder: PurePosixPath) -> str:
    known = _series_title(drawing.path)
    if known:
        return known
    stated = _BY_AUTHOR.sub("", drawing.title)
    stem = _squeeze(PurePosixPath(drawing.path).stem)
    squeezed = _squeeze(stated)
    named = bool(squeezed) and (stem.startswith(squeezed[:6]) or squeezed[:12] in stem)
    by_author = _BY_AUTHOR.match(drawing.title) is not None
    from_file = by_author or (not named and (squeezed in collections or len(squeezed) < 3))
    source = _without_author(drawing) if from_file else stated
    words = _plain_words(source)
    authors = set(_plain_words(drawing.creator, translate=False))
    words = [w for w in words if not (w in authors and len(words) > 1 and w not in GLOSSARY)]
    words = list(dict.fromkeys(words))[:8]
    while words and words[-1] in {"of", "and", "in", "on", "the", "a", "for", "with", "to"}:
        words.pop()
    if not words or not any(len(w) > 1 for w in words):
        return ""
    return _with_subject(" ".join(words), folder)


def _with_subject(title: str, folder: PurePosixPath) -> str:
    """Say what a bare name is the name of: "zimbabwe" in the flags' folder is a flag."""
    for prefix, subject in SUBJECTS.items():
        inside = folder.as_posix() == prefix or folder.as_posix().startswith(prefix + "/")
        if inside and subject.split()[-1] not in title.split():
            return f"flag of {title}" if subject == "flag" else f"{title} {subject}"
    return title


def _series_title(path: str) -> str:
    """The two series whose file names are codes: playing cards and star polygons."""
    if re.fullmatch(r"shapes/stars/star_\d+pt\d+step\.svg", path):
        return "many pointed star"
    found = re.fullmatch(r"recreation/games/cards/\w+/([a-z]+)_([hcsd])_(10|[2-9akqj])\.svg", path)
    if not found:
        return ""
    style, suit, rank = found.groups()
    return f"{RANKS[rank]} of {SUITS[suit]}, {style} playing card"


def _without_author(drawing: RawDrawing) -> str:
    """The file name's words before the author's name, which files carry cut off."""
    words = re.findall(r"[a-z]+|\d+", _ascii(PurePosixPath(drawing.path).stem).lower())
    author = re.findall(r"[a-z]+", _ascii(drawing.creator).lower())
    for start in range(1, len(words)):
        tail = [w for w in words[start:] if not w.isdigit()]
        if tail and author and len("".join(tail)) > 2:
            joined, name = "".join(tail), "".join(author)
            if name.startswith(joined) or joined.startswith(name):
                return " ".join(words[:start])
    return " ".join(words)


def _plain_words(text: str, translate: bool = True) -> list[str]:
    """Lower-case English words of a title, file name or keyword."""
    text = re.sub(r"\S+@\S+|https?://\S+|www\.\S+|HASH\(\w+\)", " ", text)
    text = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", _ascii(text))
    found: list[str] = []
    for word in re.findall(r"[a-z]+(?:'s)?", text.lower()):
        if word in TITLE_JUNK and translate:
            continue
        if not translate:
            found.append(word)
            continue
        word = RESPELL.get(word, word)
        word = GLOSSARY.get(word, word)
        for piece in word.split():
            found += _icon_parts(piece)
    return [w for w in found if len(w) > 1 or w == "a" or len(found) == 1]


def _icon_parts(word: str) -> list[str]:
    """Cut "viewleft" into "view left" where known parts cover it wholly; else leave it."""
    if len(word) < 6 or word in ICON_PARTS:
        return [word]
    best: list[list[str] | None] = [[]] + [None] * len(word)
    for end in range(1, len(word) + 1):
        for start in range(max(0, end - 10), end - 1):
            head = best[start]
            if head is not None and word[start:end] in ICON_PARTS:
                candidate = [*head, word[start:end]]
                current = best[end]
                if current is None or len(candidate) < len(current):
                    best[end] = candidate
    return best[-1] or [word]


def _keywords(drawing: RawDrawing, folder: PurePosixPath) -> tuple[str, ...]:
    """Keywords that say what is drawn, then folder names, most telling first, none twice."""
    author = _squeeze(drawing.creator)
    kept: list[str] = []
    folders = [part for part in reversed(folder.parts) if part not in FOLDER_JUNK]
    for raw in (*drawing.keywords, *folders):
        if raw.strip().lower() in KEYWORD_JUNK or raw.lower().startswith("hash"):
            continue
        words = _plain_words(raw.replace("_", " ").replace("-", " "))
        text = " ".join(words)
        squeezed = _squeeze(text)
        if not 2 < len(squeezed) <= 24 or squeezed in author or text in KEYWORD_JUNK:
            continue
        if any(_same_word(text, other) for other in kept):
            continue
        kept.append(text)
    return tuple(kept)


def _same_word(first: str, second: str) -> bool:
    return first.rstrip("s") == second.rstrip("s")


def _description(drawing: RawDrawing) -> str:
    """The first sentence of a description that is English prose about the drawing, or ""."""
    text = drawing.description
    if re.search(_FOREIGN, text, re.IGNORECASE):
        return ""
    sentence = re.split(r"(?<=[a-z)])[.;!]\s|\n", _ascii(text))[0]
    words = re.findall(r"[A-Za-z][A-Za-z'-]*", sentence)
    start = r"^(this|it) (is|was) |^(made|created|drawn|done|vectori[sz]ed) "
    plain = re.sub(start, "", " ".join(words).lower())
    if not 3 <= len(plain.split()) <= 30 or not re.search(r"\b(a|an|the|of|with|on|in)\b", plain):
        return ""
    return plain if not re.search(r"\b(inkscape|svg|clip ?art|image)\b", plain) else ""


def _caption(title: str, keywords: Sequence[str], description: str) -> str:
    """Title, then a short description where there is one, else up to three keywords."""
    seen = set(title.split())
    words = description.split()
    if 0 < len(words) <= _SHORT and set(words) - seen - {"a", "an", "the"}:
        return f"{title}, {description}"
    telling = [k for k in keywords if not {w.rstrip("s") for w in k.split()} <= _stems(seen)]
    return ", ".join([title, *telling[:3]])


def _stems(words: Iterable[str]) -> set[str]:
    return {word.rstrip("s") for word in words}
