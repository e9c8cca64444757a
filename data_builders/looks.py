"""How a picture looks: whether two are the same, and whether there is anything to see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from data_builders.pictures import Pictures


@dataclass(frozen=True)
class Look:
    """What tells whether two pictures are the same.

    Attributes:
        digest: of the bytes.
        hash: of what is drawn, see `picture_hash`; None where nothing is.
    """

    digest: str
    hash: Any

    @classmethod
    def of(cls, pictures: Pictures, reference: str, picture: Image | None = None) -> Look:
        """The look of a picture, which is loaded if it is not given.

        Raises:
            ImageProblem: it cannot be read.
        """
        from data_builders.near_duplicates import picture_hash

        loaded = pictures.load(reference) if picture is None else picture
        return cls(pictures.digest(reference), picture_hash(loaded))

    def same(self, other: Look, near: int) -> bool:
        """Whether two pictures are one, but for size, and place on white.

        Args:
            other: the other.
            near: bits in which each half of their hashes may differ, of 64.
        """
        import numpy as np

        from data_builders.near_duplicates import near_pairs

        if self.digest == other.digest:
            return True
        if self.hash is None or other.hash is None:
            return self.hash is other.hash
        return bool(near_pairs(np.stack([self.hash, other.hash]), near))


def contrast(pixels: np.ndarray) -> float:
    """Standard deviation of pixels about their mean colour, in 0..127.5: 0 of a single colour.

    Args:
        pixels: [h, w, 3], uint8.
    """
    flat = pixels.reshape(-1, pixels.shape[-1]).astype("float64")
    return float(((flat - flat.mean(0)) ** 2).mean() ** 0.5)


def colour(pixels: np.ndarray) -> str:
    """What a picture of a single colour is called: "black", "white" or "one colour"."""
    mean = pixels.reshape(-1, pixels.shape[-1]).mean(0)
    if mean.max() < 16:
        return "black"
    return "white" if mean.min() > 239 else "one colour"
