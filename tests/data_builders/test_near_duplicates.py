import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from data_builders.near_duplicates import components, near_pairs, picture_hash


def drawing(size=100, box=(20, 20, 80, 60), colour="red"):
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse(box, fill=colour)
    pen.line(box, fill="black", width=max(1, size // 20))
    return image


def test_hash_ignores_margin_and_size():
    first = picture_hash(drawing())
    moved = picture_hash(drawing(box=(5, 35, 65, 75)))
    larger = picture_hash(drawing(200, (40, 40, 160, 120)))
    assert np.count_nonzero(first != moved) == 0
    assert np.count_nonzero(first != larger) <= 6


def test_blank_has_no_hash():
    assert picture_hash(Image.new("RGB", (50, 50), "white")) is None


@given(st.integers(0, 2**32 - 1), st.integers(0, 20))
def test_near_pairs_are_those_within_the_threshold_in_both_halves(seed, threshold):
    draw = np.random.default_rng(seed)
    hashes = draw.random((12, 128)) < draw.choice([0.02, 0.1, 0.5])
    expected = [
        (i, j)
        for i in range(12)
        for j in range(i + 1, 12)
        if (hashes[i, :64] != hashes[j, :64]).sum() <= threshold
        and (hashes[i, 64:] != hashes[j, 64:]).sum() <= threshold
    ]
    assert near_pairs(hashes, threshold) == expected


def test_components_join_keys_and_pairs():
    keys = [["a"], ["b"], ["a", "c"], ["d"], ["c"], ["e"]]
    assert components(keys, [(3, 5)]) == [0, 1, 0, 3, 0, 3]
    assert components([["x"], ["y"], ["z"]]) == [0, 1, 2]
