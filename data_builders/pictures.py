"""Where a build's pictures are: names that stay valid when its folder moves."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmtune.data.images import load_image
from mmtune.data.records import ImageFile, ImageProblem

if TYPE_CHECKING:
    from PIL.Image import Image

MADE = "made"  # the root of pictures that the build itself wrote
SEPARATOR = ":"


@dataclass(frozen=True)
class Pictures:
    """References such as "source:val2014/x.jpg" or "made:imagine/17-0.png", and what they name.

    Attributes:
        roots: name of a root -> its folder; a reference may not lead out of its root.
    """

    roots: Mapping[str, Path]

    def file(self, reference: str) -> ImageFile:
        """The file of a reference, which need not exist.

        Raises:
            ImageProblem: a reference that names no root of this build.
        """
        root, found, name = reference.partition(SEPARATOR)
        if not found or root not in self.roots:
            known = ", ".join(self.roots)
            raise ImageProblem(
                "unknown root of an image", f"{reference!r}; this build has the roots {known}"
            )
        return ImageFile(str(self.roots[root]), name)

    def load(self, reference: str) -> Image:
        """The picture in RGB, see `load_image`.

        Raises:
            ImageProblem: missing, outside its root, truncated, no image.
        """
        return load_image(self.file(reference))

    def digest(self, reference: str) -> str:
        """Names the picture by its bytes: two references to equal files have the same."""
        return hashlib.sha256(self.file(reference).read()).hexdigest()[:16]

    def save(self, name: str, picture: Image | bytes) -> str:
        """Write a picture below the root of made ones, whole or not at all.

        Args:
            name: with a suffix: .png for pixels; encoded bytes are written as they are.
            picture: pixels, or an encoded picture.

        Returns:
            its reference.
        """
        path = self.roots[MADE] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            if isinstance(picture, bytes):
                partial.write_bytes(picture)
            else:
                picture.save(partial, format="PNG")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return f"{MADE}{SEPARATOR}{name}"
