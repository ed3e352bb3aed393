"""Fast functions of lgcn_fast on plain arrays: C++ on several threads, without the GIL.

Each function has the name and the meaning of its reference in `lgcn_fast.peaks` or
`lgcn_fast.operators`; `Network` and `Fitter` are what `lgcn_fast.Engine` and `lgcn_fast.fitting.NativeFitter` run on.
Those of maps take them as (B, N, H, W) float32, of which contiguous ones are not copied, and `num_threads`, of which
results do not depend; 0 is all cores. They raise ValueError for another dtype or number of dimensions, heatmaps
without pixels, points that are not finite, or a radius below 0.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from . import _native
from ._native import Fitter, Network, Shape

__all__ = [
    "BF16_TOLERANCE",
    "INSTRUCTIONS",
    "INSTRUCTION_SETS",
    "Fitter",
    "Network",
    "Shape",
    "face_votes",
    "gaussian_sum",
    "kernel_taps",
    "local_maxima",
    "peak_centroids",
    "tolerance_of",
    "window_moments",
]

INSTRUCTION_SETS = tuple(_native.instruction_sets())
"""What this processor runs the network with, best first; those with bf16 in their name multiply matrices in bf16."""
INSTRUCTIONS = {("bf16" if name.endswith("bf16") else "fp32"): name for name in reversed(INSTRUCTION_SETS)}
"""The best of them for each precision that this processor has."""
BF16_TOLERANCE = 2.0**-8
"""Of `kernel_taps` in bf16, whose rounding errors are up to 2**-9: three lines are left of the five Gaussians of Eq. 1.
It moves fitted points by 0.001 pixels of the crop (median), bf16 by 0.007."""


def gaussian_sum(
    x: np.ndarray,
    kernel_size: int = 45,
    sigmas: tuple[float, ...] = (1.0, 3.0, 5.0, 7.0, 9.0),
    num_threads: int = 0,
    instructions: str = INSTRUCTIONS["fp32"],
) -> np.ndarray:
    """Convolve every map with the sum of Gaussians K of Eq. 1; the reference is `lgcn_fast.gaussian_sum`.

    In fp32 separable passes with SIMD; a Gaussian ends where its taps are below the rounding of fp32. In bf16 banded
    matrix products, with K up to 0.0015 off (its maximum is 1).

    Args:
        instructions: one of `INSTRUCTION_SETS`.

    Returns:
        (B, C, H, W) float32.
    """
    taps = kernel_taps(kernel_size, tuple(sigmas), tolerance_of(instructions))
    return _native.gaussian_sum(_contiguous(x), taps, num_threads, instructions)


def tolerance_of(instructions: str) -> float:
    """The tolerance of `kernel_taps` that costs less than the precision of an instruction set does."""
    return BF16_TOLERANCE if instructions.endswith("bf16") else 0.0


@lru_cache(maxsize=8)
def kernel_taps(kernel_size: int, sigmas: tuple[float, ...], tolerance: float = 0.0) -> np.ndarray:
    """Lines whose outer products add up to the kernel K of Eq. 1: its Gaussians; or, with a tolerance, the singular
    vectors of K with singular values above that share of the largest, which are fewer.

    Returns:
        (S, kernel_size) float64.
    """
    if kernel_size < 1 or kernel_size % 2 == 0 or kernel_size > 1001:
        raise ValueError(f"kernel_size: expected an odd number of pixels up to 1001, got {kernel_size}")
    if not sigmas or any(not sigma > 0 for sigma in sigmas):
        raise ValueError(f"sigmas: expected one or more positive numbers, got {sigmas}")
    x = np.arange(kernel_size) - kernel_size // 2
    gaussians = np.exp(-(x**2) / (2 * np.square(sigmas)[:, None])) / len(sigmas) ** 0.5
    if not tolerance:
        return gaussians
    values, vectors = np.linalg.eigh(gaussians.T @ gaussians)
    kept = values > tolerance * values[-1]
    return (vectors[:, kept] * values[kept] ** 0.5).T.copy()


def peak_centroids(heatmaps: np.ndarray, radius: float, num_threads: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Find the maximum of every heatmap, to a fraction of a pixel: by a window of a radius in pixels around it.

    Returns:
        points (B, N, 2) float32, x and y in pixels; values (B, N) float32 of the largest pixels.
    """
    return _native.peak_centroids(_contiguous(heatmaps), radius, num_threads)


def local_maxima(
    heatmaps: np.ndarray, threshold: float, num_threads: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find all local maxima above a threshold.

    Returns:
        maps (M, 2) int64, face and landmark; pixels (M, 2) int64, x and y; values (M,) float32.
    """
    return _native.local_maxima(_contiguous(heatmaps), threshold, num_threads)


def window_moments(
    heatmaps: np.ndarray,
    centres: np.ndarray | None = None,
    radius: float = 0,
    threshold: float = 0.01,
    num_threads: int = 0,
) -> np.ndarray:
    """Sums of w^2, w^2 x and w^2 y over the pixels with a value w above a threshold, in square windows.

    Returns:
        (B, N, 3) float64.
    """
    return _native.window_moments(_contiguous(heatmaps), centres, radius, threshold, num_threads)


def face_votes(
    heatmaps: np.ndarray, offsets: np.ndarray, voters: Sequence[int], step: int = 1, num_threads: int = 0
) -> np.ndarray:
    """Votes of heatmaps for the middle of a face: their mean, each shifted by where its landmark sits.

    Returns:
        (B, S, h, w) float32.
    """
    offsets = np.asarray(offsets)
    if not np.issubdtype(offsets.dtype, np.integer) or not np.can_cast(offsets.dtype, np.int64):
        raise ValueError(f"offsets: expected whole pixels, got {offsets.dtype}")
    offsets = offsets.astype(np.int64, copy=False)
    return _native.face_votes(_contiguous(heatmaps), offsets, list(voters), step, num_threads)


def _contiguous(heatmaps: np.ndarray) -> np.ndarray:
    if heatmaps.dtype != np.float32:
        raise ValueError(f"heatmaps: expected float32, got {heatmaps.dtype}")
    return np.ascontiguousarray(heatmaps)
