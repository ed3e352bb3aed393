from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from lgcn_fast.augmentation import FIXED_VARIANTS, NONE, Augmentation, augment, blurred
from lgcn_fast.batches import AugmentedCrops, EpochBatches
from lgcn_fast.crops import CropCache
from lgcn_fast.datasets import is_validation
from lgcn_fast.landmarks import SCHEMES
from lgcn_fast.loading import shape_for
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


@pytest.mark.parametrize("size", [48, 96])
def test_a_warped_face_has_its_points_where_its_pixels_are(random, size):
    """Each pixel of the cached crop holds its own place: at a point of the result must be the place of the label."""
    image = np.dstack([*np.meshgrid(np.arange(180), np.arange(180)), np.zeros((180, 180))]).astype(np.uint8)
    shape, mirror = shape_for(None, 68), np.array(SCHEMES[68].mirror)
    warp, errors = Augmentation(scale=0.1, shift=0.05, warp=0.5), []
    for _ in range(30):
        turn = np.exp(1j * random.uniform(-0.5, 0.5)) * 30
        face = (shape.mean @ (1, 1j) * turn).view(float).reshape(-1, 2) + 89.5
        found, points = augment(image, face.astype(np.float32), BOX, size, warp, tuple(mirror), random, shape=shape)
        inside = ((points >= 0) & (points <= size - 1)).all(1)
        at = points[None, inside].astype(np.float32)
        places = cv2.remap(found.astype(np.float32), at, None, cv2.INTER_LINEAR)[0, :, :2]
        mirrored = found[size // 2, 0, 0] > found[size // 2, -1, 0]
        labels = face[mirror] if mirrored else face
        errors.append(np.abs(places - labels[inside]).max(axis=1))
        assert inside.sum() > 50
    half, most, largest = np.quantile(np.concatenate(errors), (0.5, 0.99, 1))
    assert half < 0.4
    assert most < 1
    assert largest < 2


def test_warps_change_faces_as_the_modes_do(random):
    shape = shape_for(None, 68)
    face = (shape.mean * 30 + 89.5).astype(np.float32)
    image = np.zeros((180, 180), np.uint8)
    warp = Augmentation(mirror=False, scale=0, rotation=0, warp=0.5)
    faces = np.stack([augment(image, face, BOX, 96, warp, None, random, shape=shape)[1] for _ in range(300)])
    moves = (faces - (face - 33.5) * 96 / 112 + 0.5) / (30 * 96 / 112)
    spread = np.einsum("fnd,knd->fk", moves, shape.modes).std(axis=0) / shape.variances**0.5
    # (Where the landmarks want different things at one place, as the lips do, they get the mean.)
    assert spread[:3].min() > 0.25
    assert spread[:3].max() < 0.5


def test_faces_without_a_shape_model_or_all_labels_are_not_warped(random):
    shape, image = shape_for(None, 68), random.integers(0, 256, (180, 180), np.uint8)
    face = (shape.mean * 30 + 89.5).astype(np.float32)
    partly = face.copy()
    partly[3] = np.nan
    warp = Augmentation(mirror=False, scale=0, rotation=0, warp=0.5)
    plain, points = augment(image, face, BOX, 96, NONE, None, random)
    for labels, model in ((face, None), (partly, shape)):
        found, moved = augment(image, labels, BOX, 96, warp, None, random, shape=model)
        np.testing.assert_array_equal(found, plain)
        np.testing.assert_array_equal(moved[4:], points[4:])


def test_warps_that_would_fold_faces_are_named():
    with pytest.raises(ValueError, match=r"warp: expected a share of the modes' standard deviations, 0 to 1, got 1\.5"):
        Augmentation(warp=1.5)


@pytest.mark.parametrize("labelled", [0, 1, 5])
def test_crops_warp_faces_as_those_of_the_training_vary(random, labelled):
    faces = (shape_for(None, 68).mean * 30 + 89.5 + random.normal(0, 1, (5, 68, 2))).astype(np.float32)
    faces[labelled:, 0] = np.nan
    images = list(random.integers(0, 256, (5, 180, 180), np.uint8))
    cache = CropCache(images, faces, np.tile(BOX, (5, 1)), np.array(list("abcde")), np.array(["s"] * 5))
    warp = replace(NONE, warp=0.5)
    crops, plain = (AugmentedCrops(cache, augmentation, 96, 0) for augmentation in (warp, NONE))
    for index in range(5):
        warped = not torch.equal(crops[0, index][0], plain[0, index][0])
        assert warped == (index < labelled and labelled > 1)


@pytest.mark.parametrize("color", [False, True])
def test_light_changes_pixels_only(random, color):
    image = random.integers(0, 256, (180, 180, 3) if color else (180, 180), np.uint8)
    points = random.uniform(60, 120, (4, 2)).astype(np.float32)
    light = Augmentation(
        mirror=False, scale=0, rotation=0, contrast=0.5, blur=2, noise=30, occlusion=0.5, compression=90
    )
    for _ in range(20):
        changed, moved = augment(image, points, BOX, 96, light, None, random)
        plain, expected = augment(image, points, BOX, 96, NONE, None, random)
        assert changed.dtype == np.uint8
        assert changed.shape == plain.shape
        assert not np.array_equal(changed, plain)
        np.testing.assert_array_equal(moved, expected)


def test_blur_spreads_along_its_direction_and_moves_nothing(random):
    for _ in range(10):
        along, across, angle = *random.uniform(1, 4, 2), random.uniform(0, np.pi)
        spot = np.zeros((61, 61), np.float32)
        spot[30, 30] = 1e4
        changed = blurred(spot, along, across, angle)
        places = np.stack(np.mgrid[-30:31, -30:31][::-1]).reshape(2, -1)
        weights = changed.ravel() / changed.sum()
        assert changed.sum() == pytest.approx(1e4, rel=1e-4)
        np.testing.assert_allclose(places @ weights, 0, atol=1e-3)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        expected = turn @ np.diag([along**2, across**2]) @ turn.T
        np.testing.assert_allclose(places * weights @ places.T, expected, atol=0.06 * max(along, across) ** 2)


def test_compression_changes_little_in_one_picture_of_four(random):
    picture = cv2.GaussianBlur(random.integers(0, 256, (180, 180, 3), np.uint8), (0, 0), 4)
    plain = augment(picture, np.zeros((1, 2)), BOX, 96, NONE, None, random)[0].astype(float)
    options = replace(NONE, compression=90)
    changes = [augment(picture, np.zeros((1, 2)), BOX, 96, options, None, random)[0] - plain for _ in range(200)]
    changed = [np.abs(change).mean() for change in changes if change.any()]
    assert 25 < len(changed) < 80
    assert 0.2 < np.mean(changed) < 8


def test_compression_takes_colours_for_what_they_are(random):
    """JPEG keeps brightness, to which green adds most and blue least, better than colour."""
    picture = random.integers(0, 256, (180, 180, 3), np.uint8)
    plain = augment(picture, np.zeros((1, 2)), BOX, 96, NONE, None, random)[0].astype(float)
    options = replace(NONE, compression=90)
    changes = [augment(picture, np.zeros((1, 2)), BOX, 96, options, None, random)[0] - plain for _ in range(40)]
    red, green, blue = np.sqrt(np.mean(np.square([change for change in changes if change.any()]), axis=(0, 1, 2)))
    assert green < red < blue


def test_spoiled_pictures_are_as_many_as_they_should_be(random):
    image = random.integers(50, 200, (180, 180), np.uint8)
    plain = augment(image, np.zeros((1, 2)), BOX, 96, NONE, None, random)[0]
    for name, share in (("blur", 0.25), ("occlusion", 0.5), ("noise", 0.25), ("compression", 0.25), ("contrast", 1.0)):
        options = replace(NONE, **{name: {"occlusion": 0.4, "contrast": 0.3}.get(name, 50.0)})
        views = [augment(image, np.zeros((1, 2)), BOX, 96, options, None, random)[0] for _ in range(200)]
        assert np.mean([(view != plain).any() for view in views]) == pytest.approx(share, abs=0.12), name


def test_crops_know_the_label_shifts_of_their_sets(random):
    """Those of mirror images move by twice the shift, see `test_mirror_images_keep_the_shift_of_the_labels`."""
    points = random.uniform(50, 130, (2, 68, 2)).astype(np.float32)
    groups, images = np.array(["g"] * 2), [np.zeros((180, 180), np.uint8)] * 2
    cache = CropCache(images, points, np.tile(BOX, (2, 1)), groups, np.array(["a", "b"]))
    plain, moved = (
        AugmentedCrops(cache, replace(NONE, mirror=True), 96, 0, shifts) for shifts in (None, {"a": 0.01, "b": -0.02})
    )
    for index, shift in ((0, 0.01), (1, -0.02)):
        changes = {
            round(float((moved[draw, index][1] - plain[draw, index][1])[..., 0].mean()), 3) for draw in range(20)
        }
        assert changes == {0, round(2 * shift * 96, 3)}


def test_faces_of_a_batch_are_different_variants_of_the_paper(random):
    points = random.uniform(50, 130, (1, 68, 2)).astype(np.float32)
    names, images = np.array(["g"] * FIXED_VARIANTS), [np.zeros((180, 180), np.uint8)] * FIXED_VARIANTS
    cache = CropCache(images, np.tile(points, (len(names), 1, 1)), np.tile(BOX, (len(names), 1)), names, names)
    crops = AugmentedCrops(cache, RECIPES["paper"].augmentation, 96, 0)
    assert len({crops[0, index][1].numpy().tobytes() for index in range(FIXED_VARIANTS)}) == FIXED_VARIANTS


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


def test_noise_does_not_make_white_black(random):
    white = np.full((180, 180), 250, np.uint8)
    noisy = Augmentation(noise=40, contrast=0.1)
    changed = [augment(white, np.zeros((1, 2)), BOX, 96, noisy, None, random)[0] for _ in range(60)]
    assert max(image.max() for image in changed) == 255
    assert np.mean([image < 60 for image in changed]) < 1e-3


def test_each_draw_and_each_seed_is_another(random):
    image, points = random.integers(0, 256, (180, 180), np.uint8), random.uniform(50, 130, (2, 68, 2))
    names = np.array(["g"] * 2)
    cache = CropCache([image] * 2, points.astype(np.float32), np.tile(BOX, (2, 1)), names, names)
    keys = [(seed, draw, index) for seed in (0, 1) for draw in (0, 1) for index in (0, 1)]
    images = [AugmentedCrops(cache, Augmentation(), 96, seed)[draw, index][0] for seed, draw, index in keys * 2]
    assert all(torch.equal(*pair) for pair in zip(images[:8], images[8:], strict=True))
    assert len({image.numpy().tobytes() for image in images}) == 8


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    orders = set()
    for seed in (0, 1):
        batches = EpochBatches(np.arange(40), np.ones(40), 8, seed)
        for batches.epoch in (0, 1):
            orders.add(tuple(index for batch in batches for _, index in batch))
    assert len(orders) == 4


def test_warps_are_learned_from_no_validation_face(random):
    names = [f"photo{i}" for i in range(60)]
    groups = np.array(sorted(names, key=is_validation)[-2:] + names[:1])
    assert [is_validation(group) for group in groups] == [True, True, False]
    faces = (shape_for(None, 68).mean * 30 + 89.5 + random.normal(0, 1, (3, 68, 2))).astype(np.float32)
    images = list(random.integers(0, 256, (3, 180, 180), np.uint8))
    cache = CropCache(images, faces, np.tile(BOX, (3, 1)), groups, np.array(["s"] * 3))
    assert AugmentedCrops(cache, replace(NONE, warp=0.5), 96, 0).shape is None
