import numpy as np
import pytest
import torch

import lgcn_fast_kernels
from lgcn_fast.heatmaps import blurred_ground_truth
from lgcn_fast.peaks import peak_centroids as reference

FAST = lgcn_fast_kernels.peak_centroids
BOTH = pytest.mark.parametrize("find", [reference, FAST], ids=["reference", "native"])
SHAPES = [(2, 3, 96, 96), (1, 1, 1, 1), (1, 4, 1, 7), (3, 1, 500, 3), (1, 2, 5, 5), (1, 300, 13, 17), (0, 3, 4, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_native_equals_reference(shape, random):
    heatmaps = random.normal(size=shape).astype(np.float32)
    for expected, found in zip(reference(heatmaps), FAST(heatmaps), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=2e-5, strict=True)


@pytest.mark.parametrize("kind", ["nan", "all nan", "infinite", "minus infinite", "equal", "few values"])
def test_native_equals_reference_on_odd_values(kind, random):
    heatmaps = random.normal(size=(2, 5, 12, 9)).astype(np.float32)
    places = random.random(heatmaps.shape) < 0.3
    if kind == "few values":
        heatmaps = random.integers(0, 3, heatmaps.shape).astype(np.float32)
    elif kind == "equal":
        heatmaps[:] = 0.5
    else:
        heatmaps[places] = {"infinite": np.inf, "minus infinite": -np.inf}.get(kind, np.nan)
        if kind == "all nan":
            heatmaps[0] = np.nan
    for expected, found in zip(reference(heatmaps), FAST(heatmaps), strict=True):
        assert not np.isnan(found).any()
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_native_does_not_depend_on_threads(random):
    heatmaps = random.normal(size=(4, 68, 96, 96)).astype(np.float32)
    expected = FAST(heatmaps, num_threads=1)
    for threads in (0, 2, 3, 64):
        for a, b in zip(expected, FAST(heatmaps, num_threads=threads), strict=True):
            np.testing.assert_array_equal(a, b)


@BOTH
def test_centroid_by_hand(find):
    heatmap = np.zeros((1, 1, 7, 8), np.float32)
    heatmap[0, 0, 3, 4], heatmap[0, 0, 3, 5], heatmap[0, 0, 5, 4] = 4, 2, 2
    points, values = find(heatmap)
    assert values[0, 0] == 4
    np.testing.assert_allclose(points[0, 0], [4 + 2 / 8, 3 + 2 * 2 / 8])


@BOTH
def test_first_of_equal_maxima_wins_and_a_plateau_pulls(find):
    heatmap = np.zeros((1, 2, 9, 9), np.float32)
    heatmap[0, 0, 2, 2] = heatmap[0, 0, 6, 6] = 1  # far apart: the first
    heatmap[0, 1, 4, 4] = heatmap[0, 1, 4, 5] = 1  # side by side: the middle
    points, _ = find(heatmap)
    np.testing.assert_allclose(points[0], [[2, 2], [4.5, 4]])


@BOTH
def test_peak_at_the_border_is_not_pulled_inwards(find):
    heatmap = np.zeros((1, 1, 6, 6), np.float32)
    heatmap[0, 0, 0, 3], heatmap[0, 0, 1, 3] = 2, 1
    points, _ = find(heatmap)
    np.testing.assert_allclose(points[0, 0], [3, 0])


@BOTH
def test_blurred_labels_are_found_to_a_fraction_of_a_pixel(find, random):
    points = random.uniform(10, 85, (1, 1, 50, 2)).astype(np.float32)
    heatmaps = blurred_ground_truth(torch.from_numpy(points), 96, 96).numpy()
    found, values = find(heatmaps)
    error = np.linalg.norm(found - points[:, 0], axis=-1)
    whole = np.linalg.norm(points[:, 0].round() - points[:, 0], axis=-1)
    assert error.max() < 0.3
    assert error.mean() < 0.6 * whole.mean()
    assert (values > 0.9).all()


def test_native_takes_other_layouts(random):
    heatmaps = random.normal(size=(2, 12, 9, 5)).astype(np.float32).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(FAST(heatmaps)[0], FAST(np.ascontiguousarray(heatmaps))[0])


@pytest.mark.parametrize(
    ("heatmaps", "message"),
    [
        (np.zeros((1, 1, 4, 4)), "expected float32, got float64"),
        (np.zeros((1, 4, 4), np.float32), "got 3 dimensions"),
        (np.zeros((1, 1, 0, 4), np.float32), "got 0 x 4"),
    ],
)
def test_native_refuses_what_it_cannot_read(heatmaps, message):
    with pytest.raises(ValueError, match=message):
        FAST(heatmaps)
