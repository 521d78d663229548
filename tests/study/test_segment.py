"""GrabCut from a box."""

import numpy as np
import pytest

from crab.study.segment import grabcut


def disc(noise=8):
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:96, :96]
    truth = (x - 48) ** 2 + (y - 40) ** 2 < 20**2
    image = np.where(truth[..., None], [200, 40, 40], [60, 90, 120]) + rng.normal(0, noise, (96, 96, 3))
    return image.clip(0, 255).astype(np.uint8), truth


def test_finds_a_disc_in_its_box():
    image, truth = disc()
    mask = grabcut(image, (24, 16, 72, 64), [(48, 40), (40, 40), (56, 40)])
    assert mask.dtype == bool and mask.shape == truth.shape
    assert (mask & truth).sum() / (mask | truth).sum() > 0.95
    assert not mask[:16].any() and not mask[64:].any()


def test_same_prompt_same_mask():
    image, _ = disc(60)
    first = grabcut(image, (24, 16, 72, 64), [(48, 40)])
    grabcut(image[::-1].copy(), (0, 0, 50, 50))
    assert (grabcut(image, (24, 16, 72, 64), [(48, 40)]) == first).all()


def test_falls_back_to_the_box():
    flat = np.full((64, 64, 3), 90, np.uint8)
    mask = grabcut(flat, (8, 8, 24, 16))
    box = np.zeros((64, 64), bool)
    box[8:16, 8:24] = True
    assert mask.any() and not (mask & ~box).any()
    assert grabcut(flat, (0, 0, 64, 64)).all()


@pytest.mark.parametrize("box", [(10, 10, 10, 20), (-9, 3, 0, 9), (70, 70, 90, 90), (30, 30, 20, 20)])
def test_empty_box(box):
    assert not grabcut(np.zeros((64, 64, 3), np.uint8), box).any()


def test_wrong_image():
    with pytest.raises(ValueError, match="uint8"):
        grabcut(np.zeros((8, 8)), (0, 0, 4, 4))
