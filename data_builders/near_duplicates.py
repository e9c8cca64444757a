"""Near-duplicate pictures, and the groups of records that must not be torn apart by a split."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

HASH_BITS = 128


def picture_hash(image: Image) -> np.ndarray | None:
    """Hash what is drawn, whatever its size, place and margin on a white ground.

    The picture is cropped to what is not white, then made small twice: 9 x 8 for the sign of
    horizontal differences (dHash) and 8 x 8 for "lighter than the mean" (aHash).

    Args:
        image: RGB on white.

    Returns:
        Shape [128], bool: 64 bits of dHash, then 64 of aHash; None where nothing is drawn.
    """
    import numpy as np
    from PIL.Image import Resampling

    drawn = (np.asarray(image) < 250).any(axis=-1)
    if drawn.sum() < 20:
        return None
    rows, columns = (np.unique(places) for places in np.nonzero(drawn))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    grey = image.convert("L").crop(box)
    steps = np.asarray(grey.resize((9, 8), Resampling.BOX)).astype(np.int16)
    cells = np.asarray(grey.resize((8, 8), Resampling.BOX)).astype(np.int16)
    difference = steps[:, 1:] > steps[:, :-1]
    return np.concatenate([difference.ravel(), (cells > cells.mean()).ravel()])


def near_pairs(hashes: np.ndarray, threshold: int) -> list[tuple[int, int]]:
    """Pairs i < j whose dHash and aHash both differ in at most `threshold` bits.

    Args:
        hashes: [n, 128], bool.
        threshold: Hamming distance allowed in each half, 0..64.
    """
    import numpy as np

    near = np.ones((len(hashes), len(hashes)), dtype=bool)
    for half in (hashes[:, :64], hashes[:, 64:]):
        bits = half.astype(np.float32)
        ones = bits.sum(axis=1)
        near &= ones[:, None] + ones[None, :] - 2 * bits @ bits.T <= threshold + 0.5
    first, second = np.nonzero(np.triu(near, k=1))
    return list(zip(first.tolist(), second.tolist(), strict=True))


def components(
    keys: Sequence[Iterable[Hashable]], pairs: Iterable[tuple[int, int]] = ()
) -> list[int]:
    """Connected components of n records that share a key or are paired.

    Args:
        keys: for each of n records, the keys (such as normalised texts) that tie it to others.
        pairs: further ties, as indices.

    Returns:
        n component numbers: the lowest record index of the component.
    """
    parent = list(range(len(keys)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    def tie(first: int, second: int) -> None:
        low, high = sorted((root(first), root(second)))
        parent[high] = low

    holders: dict[Hashable, int] = {}
    for index, its_keys in enumerate(keys):
        for key in its_keys:
            tie(index, holders.setdefault(key, index))
    for first, second in pairs:
        tie(first, second)
    return [root(index) for index in range(len(keys))]
