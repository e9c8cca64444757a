from __future__ import annotations

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform

from mmtune.backbones.base import ImageSpec
from mmtune.data.transforms import AugmentOptions, EvalTransform, TrainTransform
from tests.data.pictures import noise

SPEC = ImageSpec(16, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (16, 16), (9, 50), (7, 7)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_evaluation_equals_open_clip(size, interpolation, resize):
    spec = ImageSpec(16, SPEC.mean, SPEC.std, interpolation, resize)
    theirs = image_transform(
        16, False, spec.mean, spec.std, resize_mode=resize, interpolation=interpolation
    )
    image = noise(0, size)
    torch.testing.assert_close(EvalTransform(spec)(image), theirs(image), rtol=0, atol=1e-6)


def test_augmentation_depends_on_seed_epoch_and_index_only():
    options = AugmentOptions(flip=0.5, brightness=0.3, contrast=0.3, saturation=0.3)
    image = noise(1)
    one = TrainTransform(SPEC, options, seed=5)
    first = one(image, 2, 9)
    torch.manual_seed(123)
    np.random.seed(7)
    one(image, 0, 0)
    assert torch.equal(first, one(image, 2, 9))
    assert torch.equal(first, TrainTransform(SPEC, options, seed=5)(image, 2, 9))
    for seed, epoch, index in ((6, 2, 9), (5, 3, 9), (5, 2, 10)):
        assert not torch.equal(first, TrainTransform(SPEC, options, seed)(image, epoch, index))


def test_no_augmentation_is_a_plain_resize():
    options = AugmentOptions(scale=(1, 1), ratio=(1, 1))
    image = noise(2, (32, 32))
    torch.testing.assert_close(
        TrainTransform(SPEC, options, 0)(image, 0, 0), EvalTransform(SPEC)(image), rtol=0, atol=1e-6
    )


def test_flip_mirrors():
    plain = TrainTransform(SPEC, AugmentOptions((1, 1), (1, 1), flip=0.0), 0)
    mirrored = TrainTransform(SPEC, AugmentOptions((1, 1), (1, 1), flip=1.0), 0)
    image = noise(3, (32, 32))
    assert torch.equal(plain(image, 0, 0).flip(2), mirrored(image, 0, 0))


@pytest.mark.parametrize("size", [(40, 30), (3, 200), (200, 3), (1, 1)])
def test_crops_stay_inside_and_keep_the_asked_area(size):
    transform = TrainTransform(SPEC, AugmentOptions(scale=(0.5, 0.9)), 0)
    shares = []
    for index in range(40):
        import random

        top, left, height, width = transform._crop(*size, random.Random(index))
        assert 0 <= top <= size[1] - height
        assert 0 <= left <= size[0] - width
        assert height > 0
        assert width > 0
        shares.append(height * width / (size[0] * size[1]))
        assert transform(noise(0, size), 0, index).shape == (3, 16, 16)
    if size == (40, 30):
        assert min(shares) > 0.45
        assert max(shares) < 0.95


@pytest.mark.parametrize("bad", [{"scale": (0, 1)}, {"scale": (0.9, 0.5)}, {"ratio": (2, 1)}])
def test_impossible_options_are_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        AugmentOptions(**bad)
    with pytest.raises(ValueError, match="no interpolation 'cubic'"):
        EvalTransform(ImageSpec(16, SPEC.mean, SPEC.std, "cubic"))
