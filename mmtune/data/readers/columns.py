"""Which column of a table or mapping is the image, and which the caption."""

from __future__ import annotations

from collections.abc import Collection

CAPTIONS = ("captions", "caption", "texts", "text", "sentences")
IMAGES = ("image", "jpg", "png", "image_path", "file_name", "path")


def caption_column(names: Collection[str]) -> str | None:
    """The first known caption column that is present, or None."""
    return next((name for name in CAPTIONS if name in names), None)


def image_column(names: Collection[str]) -> str | None:
    """The first known image column that is present, or None."""
    return next((name for name in IMAGES if name in names), None)
