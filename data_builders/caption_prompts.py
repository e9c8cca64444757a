"""Ways to ask for a caption, of which one is drawn as another wording of a caption prompt."""

from __future__ import annotations

from pathlib import Path

from mmtune.data.records import DataError, Problem

CAPTION_PROMPTS = (
    "a picture showing",
    "a photo that shows",
    "the photo shows",
    "in this image there is",
    "one can see here",
    "an image with",
    "a view of",
    "what you see here is",
    "this is a photo of",
    "caption:",
    "Say in one sentence what this image shows.",
    "Write a caption for this picture.",
    "Sum up the scene in a few words.",
    "What is going on in this picture?",
    "Tell me what the photo is about.",
    "Put what you see into a sentence.",
    "State what can be seen in the image.",
    "What does this photograph show?",
    "Give this image a short caption.",
)


def read_prompts(path: str) -> list[str]:
    """The prompts of a text file, one a line; blank lines and those that start with # are left out.

    Raises:
        DataError: a file that cannot be read, is no text, or holds none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        text = f"{type(error).__name__}: {error}"
        raise DataError([Problem(path, "list of prompts cannot be read", text)]) from None
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not found:
        raise DataError([Problem(path, "no prompt", "expected one a line, in UTF-8")])
    return list(dict.fromkeys(found))
