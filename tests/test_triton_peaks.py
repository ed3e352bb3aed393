"""Maxima and moments in Triton: in its interpreter where there is no GPU (conftest.py), compiled where there is one."""

import importlib.util

import numpy as np
import pytest
import torch

from lgcn_fast.peaks import peak_centroids, window_moments

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton (pip install '.[gpu]')")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(2, 3, 96, 96), (1, 1, 1, 1), (1, 2, 1, 7), (1, 2, 9, 1), (2, 1, 31, 37), (1, 1, 130, 45), (1, 2, 3, 4)]
SHAPES += [(1, 2, 33, 64), (1, 1, 5, 32)]


@pytest.fixture
def kernel(monkeypatch):
    from lgcn_fast_kernels import triton_peaks

    # An element that the kernel does not write stays NaN.
    monkeypatch.setattr(torch, "empty", lambda size, **options: torch.full(size, float("nan"), **options))
    return triton_peaks.heatmap_reduction


def check(
    kernel, heatmaps: np.ndarray, threshold: float = 0.01, dtype: torch.dtype = torch.float32, radius: int = 6
) -> None:
    """Points, values and moments are those of the references, every one of them written."""
    given = torch.from_numpy(heatmaps).to(DEVICE, dtype)
    found = kernel(given, radius, threshold).cpu().numpy()
    heatmaps = given.float().cpu().numpy()
    points, values = peak_centroids(heatmaps, radius)
    np.testing.assert_allclose(found[..., :2], points, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found[..., 2], values)
    np.testing.assert_allclose(found[..., 3:], window_moments(heatmaps, threshold=threshold), rtol=1e-6)


@pytest.mark.parametrize("radius", [0, 2, 12])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_references(kernel, random, shape, radius):
    threshold = random.choice([0.01, 0.5, 0.0, -1.0])
    check(kernel, random.normal(size=shape).astype(np.float32), threshold, radius=radius)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reads_half_precision(kernel, random, dtype):
    check(kernel, random.normal(size=(1, 2, 20, 33)), dtype=dtype)


def test_smooth_maps(kernel, random):
    """As the network makes them: hills on a wide foot, some at or beyond the border."""
    centres = random.uniform(-3, 50, (1, 12, 2, 1, 1))
    distance = (np.arange(48) - centres[:, :, 0]) ** 2 + (np.arange(48)[:, None] - centres[:, :, 1]) ** 2
    check(kernel, (0.2 + 0.5 * np.exp(-distance / 8)).astype(np.float32))


def test_first_of_equal_maxima(kernel, random):
    heatmaps = random.integers(0, 4, (1, 5, 15, 17)).astype(np.float32)
    heatmaps[0, 0] = 0.5
    check(kernel, heatmaps)
    # In different blocks that the kernel reads, the later one further left.
    heatmaps = np.zeros((1, 1, 130, 45), np.float32)
    heatmaps.reshape(-1)[[4000, 4099]] = 1
    check(kernel, heatmaps)
    heatmaps = np.zeros((1, 1, 40, 64), np.float32)
    heatmaps[0, 0, [0, 3], [40, 2]] = 1
    check(kernel, heatmaps)


def test_peaks_at_the_border(kernel, random):
    """Every position of the peak in a small map, so that the window is cut in every way."""
    heatmaps = random.uniform(0, 1, (1, 42, 6, 7)).astype(np.float32)
    heatmaps.reshape(42, 42)[np.arange(42), np.arange(42)] = 1.5
    check(kernel, heatmaps)


def test_values_that_are_not_finite(kernel, random):
    heatmaps = random.normal(size=(1, 8, 12, 11)).astype(np.float32)
    heatmaps[0, 0, 3:, :] = np.nan
    heatmaps[0, 1] = np.nan
    heatmaps[0, 2] = -np.inf
    heatmaps[0, 3, 5, 6] = np.nan
    heatmaps[0, 3, 5, 7] = 9  # The peak, beside a NaN.
    heatmaps[0, 4, :4] = -np.inf
    heatmaps[0, 5, 0, 0] = np.nan
    check(kernel, heatmaps)
    heatmaps[0, 6, 4, 7] = np.inf
    found = kernel(torch.from_numpy(heatmaps).to(DEVICE), 6)[0, 6].cpu().numpy()
    np.testing.assert_array_equal(found[:3], [7, 4, np.inf])


def test_extreme_magnitudes(kernel, random):
    heatmaps = random.normal(size=(1, 3, 9, 9)).astype(np.float32)
    heatmaps[0, 0] *= 1e15
    heatmaps[0, 1] *= 1e-15
    check(kernel, heatmaps)


def test_empty_batch(kernel):
    assert kernel(torch.zeros((0, 3, 4, 4), device=DEVICE), 2).shape == (0, 3, 6)


@pytest.mark.parametrize(
    ("shape", "step", "dtype"),
    [((1, 4, 4), 1, torch.float32), ((1, 1, 4, 4), 1, torch.int64), ((1, 1, 4, 8), 2, torch.float32),
     ((1, 1, 0, 4), 1, torch.float32)],
)  # fmt: skip
def test_wrong_heatmaps_are_named(kernel, shape, step, dtype):
    heatmaps = torch.zeros(shape, dtype=dtype, device=DEVICE)[..., ::step]
    with pytest.raises(ValueError, match=r"heatmaps: expected contiguous \(B, N, H, W\) float32.*, got"):
        kernel(heatmaps, 2)


@pytest.mark.parametrize("radius", [-1, 2.5])
def test_wrong_radius_is_named(kernel, radius):
    with pytest.raises(ValueError, match=f"radius: expected 0 or more whole pixels, got {radius}"):
        kernel(torch.zeros(1, 1, 4, 4, device=DEVICE), radius)
