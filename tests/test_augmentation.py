import numpy as np
import pytest

from lgcn_fast.augmentation import FIXED_VARIANTS, NONE, Augmentation, augment
from lgcn_fast.batches import AugmentedCrops, EpochBatches
from lgcn_fast.crops import CropCache
from lgcn_fast.landmarks import SCHEMES
from lgcn_fast.recipes import RECIPES

BOX = np.array([34, 34, 112, 112], np.float32)


def spots(points):
    """An image with a bright spot of its own height at each point."""
    y, x = np.mgrid[:180, :180]
    image = np.zeros((180, 180))
    for index, (px, py) in enumerate(points):
        image += (120 + 60 * index) * np.exp(-((x - px) ** 2 + (y - py) ** 2) / 8)
    return image.clip(0, 255).astype(np.uint8)


def test_pixels_and_points_move_together(random):
    points = np.array([[70.0, 80.0], [110.0, 75.0], [95.0, 120.0]], np.float32)
    for _ in range(30):
        image, moved = augment(spots(points), points, BOX, 96, Augmentation(shift=0.1), (1, 0, 2), random)
        for x, y in moved:
            window = image[int(y) - 3 : int(y) + 5, int(x) - 3 : int(x) + 5].astype(float)
            rows, columns = np.mgrid[int(y) - 3 : int(y) + 5, int(x) - 3 : int(x) + 5]
            weights = window**2 / (window**2).sum()
            assert (columns * weights).sum() == pytest.approx(x, abs=0.5)
            assert (rows * weights).sum() == pytest.approx(y, abs=0.5)


def test_mirrored_points_change_their_names(random):
    points = np.array([[70.0, 80.0], [110.0, 75.0]], np.float32)
    seen = set()
    for _ in range(40):
        _, moved = augment(spots(points), points, BOX, 96, Augmentation(scale=0, rotation=0), (1, 0), random)
        assert moved[0, 0] < moved[1, 0]  # the left one stays the left one
        seen.add(round(float(moved[0, 1]), 2))
    assert len(seen) == 2


def test_without_changes_the_box_becomes_the_crop(random):
    corners = np.array([[33.5, 33.5], [145.5, 145.5]], np.float32)
    _, moved = augment(np.zeros((180, 180), np.uint8), corners, BOX, 96, NONE, None, random)
    np.testing.assert_allclose(moved, [[-0.5, -0.5], [95.5, 95.5]], atol=1e-3)


def test_the_paper_has_18_fixed_variants(random):
    points = random.uniform(60, 120, (68, 2)).astype(np.float32)
    image = np.zeros((180, 180), np.uint8)
    mirror = SCHEMES[68].mirror
    augmentation = Augmentation(fixed=True)
    variants = [augment(image, points, BOX, 96, augmentation, mirror, random, draw)[1] for draw in range(36)]
    assert len({variant.round(3).tobytes() for variant in variants}) == 18
    np.testing.assert_array_equal(variants[5], variants[23])
    # The fifth is neither scaled nor turned nor mirrored.
    np.testing.assert_allclose(variants[4], (points - 33.5) * 96 / 112 - 0.5, atol=1e-3)


def test_mirror_images_keep_the_shift_of_the_labels(random):
    """What is drawn mirrored and turned is what a mirrored photo, labelled by the same people, would be unmirrored."""
    points = random.uniform(60, 120, (68, 2)).astype(np.float32)
    image = np.zeros((180, 180), np.uint8)
    mirror, shift, fixed = SCHEMES[68].mirror, 0.03, Augmentation(fixed=True)
    photo = (points * (-1, 1) + (179 + 2 * shift * BOX[2], 0))[list(mirror)].astype(np.float32)
    box = np.array([180 - BOX[0] - BOX[2], *BOX[1:]], np.float32)
    for scale in range(3):
        for turn in range(3):
            _, straight = augment(image, photo, box, 96, fixed, mirror, random, 3 * scale + 2 - turn, shift)
            _, mirrored = augment(image, points, BOX, 96, fixed, mirror, random, 9 + 3 * scale + turn, shift)
            np.testing.assert_allclose(mirrored, straight, atol=1e-4)


@pytest.mark.parametrize("color", [False, True])
def test_light_changes_pixels_only(random, color):
    image = random.integers(0, 256, (180, 180, 3) if color else (180, 180), np.uint8)
    points = random.uniform(60, 120, (4, 2)).astype(np.float32)
    light = Augmentation(mirror=False, scale=0, rotation=0, contrast=0.5, blur=2, noise=30, occlusion=0.5)
    for _ in range(20):
        changed, moved = augment(image, points, BOX, 96, light, None, random)
        plain, expected = augment(image, points, BOX, 96, NONE, None, random)
        assert changed.dtype == np.uint8
        assert changed.shape == plain.shape
        assert not np.array_equal(changed, plain)
        np.testing.assert_array_equal(moved, expected)


def test_missing_labels_stay_missing(random):
    points = np.full((3, 2), np.nan, np.float32)
    _, moved = augment(np.zeros((180, 180), np.uint8), points, BOX, 96, Augmentation(), (0, 1, 2), random)
    assert np.isnan(moved).all()


def test_an_epoch_of_the_paper_sees_all_variants_of_a_crop(random):
    image, points = random.integers(0, 256, (180, 180), np.uint8), random.uniform(50, 130, (1, 68, 2))
    cache = CropCache([image], points.astype(np.float32), BOX[None], np.array(["g"]), np.array(["s"]))
    crops = AugmentedCrops(cache, RECIPES["paper"].augmentation, 96, 0)
    keys = [key for batch in EpochBatches(np.array([0]), np.ones(1), 6, 0, FIXED_VARIANTS) for key in batch]
    assert len(keys) == FIXED_VARIANTS
    assert len({crops[key][0].numpy().tobytes() for key in keys}) == FIXED_VARIANTS
    assert len({crops[key][1].numpy().tobytes() for key in keys}) == FIXED_VARIANTS
