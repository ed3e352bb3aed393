import ctypes
import shutil
import subprocess
from pathlib import Path

import array_api_strict
import numpy as np
import pytest
import scipy.ndimage
import torch

import lgcn_fast_kernels
from lgcn_fast import peaks
from lgcn_fast.heatmaps import blurred_ground_truth

FAST = lgcn_fast_kernels.peak_centroids
RADII = pytest.mark.parametrize("radius", [0, 2, 6.5, 12])
BOTH = pytest.mark.parametrize("find", [peaks.peak_centroids, FAST], ids=["reference", "native"])
SHAPES = [(2, 3, 96, 96), (1, 1, 1, 1), (1, 4, 1, 7), (3, 1, 500, 3), (1, 2, 5, 5), (1, 300, 13, 17), (0, 3, 4, 4)]


@RADII
@pytest.mark.parametrize("shape", SHAPES)
def test_native_equals_reference(shape, radius, random):
    heatmaps = random.normal(size=shape).astype(np.float32)
    for expected, found in zip(peaks.peak_centroids(heatmaps, radius), FAST(heatmaps, radius), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=2e-5, strict=True)


@RADII
@pytest.mark.parametrize("kind", ["nan", "all nan", "minus infinite", "equal", "few values"])
def test_native_equals_reference_on_odd_values(kind, radius, random):
    heatmaps = random.normal(size=(2, 5, 12, 9)).astype(np.float32)
    places = random.random(heatmaps.shape) < 0.3
    if kind == "few values":
        heatmaps = random.integers(0, 3, heatmaps.shape).astype(np.float32)
    elif kind == "equal":
        heatmaps[:] = 0.5
    else:
        heatmaps[places] = -np.inf if kind == "minus infinite" else np.nan
        if kind == "all nan":
            heatmaps[0] = np.nan
    for expected, found in zip(peaks.peak_centroids(heatmaps, radius), FAST(heatmaps, radius), strict=True):
        assert not np.isnan(found).any()
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_an_infinite_value_is_found(random):
    heatmaps = random.normal(size=(1, 1, 12, 9)).astype(np.float32)
    heatmaps[0, 0, 5, 3] = np.inf
    points, values = FAST(heatmaps, 4)
    np.testing.assert_array_equal([*points[0, 0], values[0, 0]], [3, 5, np.inf])


def test_native_does_not_depend_on_threads(random):
    heatmaps = random.normal(size=(4, 68, 96, 96)).astype(np.float32)
    expected = FAST(heatmaps, 12, num_threads=1)
    for threads in (0, 2, 3, 64):
        for a, b in zip(expected, FAST(heatmaps, 12, num_threads=threads), strict=True):
            np.testing.assert_array_equal(a, b)


@BOTH
def test_centroid_by_hand(find):
    heatmap = np.zeros((1, 1, 7, 8), np.float32)
    heatmap[0, 0, 3, 4], heatmap[0, 0, 3, 5], heatmap[0, 0, 5, 4], heatmap[0, 0, 3, 1] = 4, 2, 2, -9
    points, values = find(heatmap, 2)
    assert values[0, 0] == 4
    np.testing.assert_allclose(points[0, 0], [4 + 4 / 24, 3 + 2 * 4 / 24])
    np.testing.assert_allclose(find(heatmap, 1)[0][0, 0], [4 + 4 / 20, 3])
    np.testing.assert_array_equal(find(heatmap, 0)[0][0, 0], [4, 3])


@BOTH
def test_first_of_equal_maxima_wins_and_a_plateau_pulls(find):
    heatmap = np.zeros((1, 3, 9, 9), np.float32)
    heatmap[0, 0, 2, 2] = heatmap[0, 0, 6, 6] = 1  # far apart: the first
    heatmap[0, 1, 4, 4] = heatmap[0, 1, 4, 5] = 1  # side by side: the middle
    heatmap[0, 2] = -1 - heatmap[0, 0]  # nothing above 0: the pixel
    points, _ = find(heatmap, 2)
    np.testing.assert_allclose(points[0], [[2, 2], [4.5, 4], [0, 0]])


@BOTH
def test_peak_at_the_border_is_not_pulled_inwards(find):
    heatmap = np.zeros((1, 2, 6, 6), np.float32)
    heatmap[0, 0, 0, 3], heatmap[0, 0, 1, 3] = 2, 1
    heatmap[0, 1, 4, 4], heatmap[0, 1, 4, 2], heatmap[0, 1, 1, 4] = 2, 1, 1  # one pixel away: only the next ones count
    points, _ = find(heatmap, 4)
    np.testing.assert_allclose(points[0], [[3, 0], [4, 4]])


@BOTH
def test_blurred_labels_are_found_to_a_fraction_of_a_pixel(find, random):
    points = random.uniform(10, 85, (1, 1, 50, 2)).astype(np.float32)
    heatmaps = blurred_ground_truth(torch.from_numpy(points), 96, 96).numpy()
    found, values = find(heatmaps, peaks.PEAK_RADIUS)
    error = np.linalg.norm(found - points[:, 0], axis=-1)
    whole = np.linalg.norm(points[:, 0].round() - points[:, 0], axis=-1)
    assert error.max() < 0.1
    assert error.mean() < 0.1 * whole.mean()
    assert (values > 0.9).all()


def test_native_takes_other_layouts(random):
    heatmaps = random.normal(size=(2, 12, 9, 5)).astype(np.float32).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(FAST(heatmaps, 3)[0], FAST(np.ascontiguousarray(heatmaps), 3)[0])


@pytest.mark.parametrize(
    ("heatmaps", "message"),
    [
        (np.zeros((1, 1, 4, 4)), "expected float32, got float64"),
        (np.zeros((1, 4, 4), np.float32), r"expected \(B, N, H, W\), got \(1, 4, 4\)"),
        (np.zeros((1, 1, 0, 4), np.float32), "got 0 x 4"),
    ],
)
def test_native_refuses_what_it_cannot_read(heatmaps, message):
    with pytest.raises(ValueError, match=message):
        FAST(heatmaps, 3)


def batch_of(kind, shape, random):
    if kind == "levels":
        return random.integers(0, 4, shape).astype(np.float32)
    heatmaps = random.normal(size=shape).astype(np.float32)
    if kind in ("nan", "inf", "-inf"):
        heatmaps[random.random(shape) < 0.2] = float(kind)
    return heatmaps


KINDS = pytest.mark.parametrize("kind", ["random", "levels", "nan", "inf", "-inf"])


@KINDS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_native_local_maxima_equal_reference(kind, shape, threads, random):
    heatmaps = batch_of(kind, shape, random)
    expected, found = peaks.local_maxima(heatmaps, 0.5), lgcn_fast_kernels.local_maxima(heatmaps, 0.5, threads)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [None, 0, 7, 20.5])
def test_native_moments_equal_reference(shape, radius, random):
    heatmaps = random.uniform(-0.5, 1, shape).astype(np.float32)
    centres = None if radius is None else random.uniform(-30, 120, (*shape[:2], 2))
    expected = peaks.window_moments(heatmaps, centres, radius or 0)
    found = lgcn_fast_kernels.window_moments(heatmaps, centres, radius or 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_moments_by_hand():
    heatmap = np.zeros((1, 1, 4, 5), np.float32)
    heatmap[0, 0, 1, 2], heatmap[0, 0, 3, 4], heatmap[0, 0, 0, 0] = 0.5, 1, 0.01  # the last is not above 1 %
    np.testing.assert_allclose(peaks.window_moments(heatmap)[0, 0], [1.25, 0.25 * 2 + 4, 0.25 * 1 + 3])
    near = peaks.window_moments(heatmap, np.array([[[2.4, 1.0]]]), 1)
    np.testing.assert_allclose(near[0, 0], [0.25, 0.5, 0.25])


def test_local_maxima_are_scipys(random):
    """Without equal values, a local maximum is a pixel that a 3 x 3 maximum filter leaves as it is."""
    heatmaps = random.normal(size=(2, 3, 40, 50)).astype(np.float32)
    filtered = scipy.ndimage.maximum_filter(heatmaps, size=(1, 1, 3, 3), mode="constant", cval=-np.inf)
    expected = np.argwhere((heatmaps == filtered) & (heatmaps > 0.5))
    maps, pixels, values = lgcn_fast_kernels.local_maxima(heatmaps, 0.5)
    np.testing.assert_array_equal(maps, expected[:, :2])
    np.testing.assert_array_equal(pixels, expected[:, :1:-1])
    np.testing.assert_array_equal(values, heatmaps[tuple(expected.T)])


def test_a_flat_top_is_one_peak_and_a_constant_map_one_in_the_corner():
    heatmaps = np.zeros((1, 2, 9, 9), np.float32)
    heatmaps[0, 0, 3:6, 4:7] = 1
    heatmaps[0, 1] = 1
    for find in (peaks.local_maxima, lgcn_fast_kernels.local_maxima):
        maps, pixels, _ = find(heatmaps, 0.5)
        np.testing.assert_array_equal(maps, [[0, 0], [0, 1]])
        np.testing.assert_array_equal(pixels, [[4, 3], [0, 0]])


def test_window_centroids_by_hand():
    heatmaps = np.zeros((1, 1, 9, 9))
    heatmaps[0, 0, 4, 5], heatmaps[0, 0, 4, 7], heatmaps[0, 0, 0, 0] = 1, 2, 3

    def around(x, y, radius=3, threshold=0.0):
        points, values = peaks.window_centroids(heatmaps, np.array([[[x, y]]]), radius, threshold)
        return [*points[0, 0], values[0, 0]]

    np.testing.assert_allclose(around(4.4, 4.2), [(5 + 4 * 7) / 5, 4, 2])
    np.testing.assert_allclose(around(4.4, 4.2, threshold=1.5), [7, 4, 2])
    np.testing.assert_allclose(around(4.4, 4.2, radius=1), [5, 4, 1])
    np.testing.assert_allclose(around(2.2, 4.2, radius=1), [2.2, 4.2, 0])  # nothing there
    np.testing.assert_allclose(around(-0.4, -0.4), [-0.4, -0.4, 0])  # outside
    np.testing.assert_allclose(around(0.4, 0.4, radius=30), [0, 0, 3])  # cut at the border


@pytest.mark.parametrize("namespace", ["array_api_strict", "torch"])
def test_references_run_on_any_array_namespace(namespace, random):
    heatmaps, targets = random.normal(size=(2, 3, 11, 13)), random.uniform(0, 10, (2, 3, 2))
    convert = array_api_strict.asarray if namespace == "array_api_strict" else torch.from_numpy
    for name, arguments in (
        ("peak_centroids", (3,)),
        ("window_centroids", (targets, 3, 0.5)),
        ("window_moments", (targets, 3)),
        ("local_maxima", (0.5,)),
    ):
        function = getattr(peaks, name)
        converted = [convert(a) if isinstance(a, np.ndarray) else a for a in arguments]
        expected, found = function(heatmaps, *arguments), function(convert(heatmaps), *converted)
        for a, b in zip(expected if isinstance(expected, tuple) else (expected,),
                        found if isinstance(found, tuple) else (found,), strict=True):  # fmt: skip
            np.testing.assert_allclose(np.from_dlpack(b), a, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k, h: k.peak_centroids(h, -1), "radius: expected 0 or more"),
        (lambda k, h: k.peak_centroids(h, np.nan), "radius: expected 0 or more"),
        (
            lambda k, h: k.window_moments(h, np.zeros((1, 1, 2)), 3),
            r"centres: expected \(1, 2, 2\), .*, got \(1, 1, 2\)",
        ),
        (lambda k, h: k.window_moments(h, np.full((1, 2, 2), np.inf), 3), "centres: expected finite"),
        (lambda k, h: k.window_moments(h, np.zeros((1, 2, 2)), -1), "radius: expected 0 or more"),
        (lambda k, h: k.local_maxima(h[0], 0.5), r"expected \(B, N, H, W\), got \(2, 5, 5\)"),
    ],
)
def test_native_names_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(lgcn_fast_kernels, np.zeros((1, 2, 5, 5), np.float32))


@pytest.fixture(scope="module")
def every_width(tmp_path_factory) -> ctypes.CDLL:
    """csrc/peaks.hpp, with the registers to use as the first argument."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    library, root = tmp_path_factory.mktemp("width") / "every_width.so", Path(__file__).parents[1]
    flags = ("-std=c++17", "-O3", "-Wno-psabi", "-fno-trapping-math", "-fno-signed-zeros", "-fPIC", "-shared")
    folders = (f"-I{root / folder}" for folder in ("csrc", "kernels"))
    subprocess.run(["g++", *flags, *folders, root / "tests/every_width.cpp", "-o", library], check=True)
    functions = ctypes.CDLL(library)
    functions.row_maximum.restype, functions.first_maximum.restype = ctypes.c_float, ctypes.c_int64
    return functions


def test_every_width_of_registers(every_width, random):
    """Windows narrower than a vector, of whole vectors, and with a rest; NaN and infinity beside them."""
    registers, address = range(every_width.widest() + 1), lambda array: ctypes.c_void_p(array.ctypes.data)
    for _ in range(300):
        height, width = (int(side) for side in random.integers(1, 70, 2))
        heatmap = random.normal(size=(height, width)).astype(np.float32)
        heatmap[random.random(heatmap.shape) < 0.2] = random.choice([np.nan, -np.inf, 0.5])
        y0, y1 = np.sort(random.integers(0, height + 1, 2))
        x0, x1 = np.sort(random.integers(0, width + 1, 2))
        seen = heatmap[y0:y1, x0:x1].astype(np.float64)
        squares = np.where(seen > 0.25, seen, 0) ** 2
        expected = squares.sum(), (squares * np.arange(x0, x1)).sum(), (squares.T * np.arange(y0, y1)).sum()
        ranked = np.where(np.isnan(heatmap), -np.inf, heatmap)
        for width_of in registers:
            sides, window, found = map(ctypes.c_int64, heatmap.shape), np.array([y0, y1, x0, x1]), np.empty(3)
            every_width.moments(
                width_of, address(heatmap), *sides, address(window), ctypes.c_float(0.25), address(found)
            )
            np.testing.assert_allclose(found, expected, rtol=1e-6)
            count = ctypes.c_int64(heatmap.size)
            assert every_width.first_maximum(width_of, address(heatmap), count) == ranked.argmax()
            assert every_width.row_maximum(width_of, address(heatmap), ctypes.c_int64(width)) == ranked[0].max()
