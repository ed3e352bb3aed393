"""Fast functions of lgcn_fast, on plain arrays; the reference of each has the same name in `lgcn_fast`."""

import numpy as np

from . import _native

__all__ = ["peak_centroids"]


def peak_centroids(heatmaps: np.ndarray, num_threads: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Find the maximum of every heatmap, to a fraction of a pixel; the reference is `lgcn_fast.peaks.peak_centroids`.

    C++ on several threads, without the GIL.

    Args:
        heatmaps: (B, N, H, W) float32; contiguous input is not copied.
        num_threads: 0 for all cores; the result does not depend on it.

    Returns:
        points (B, N, 2) float32, x and y in pixels; values (B, N) float32 of the largest pixels.

    Raises:
        ValueError: another dtype or number of dimensions, or heatmaps without pixels.
    """
    if heatmaps.dtype != np.float32:
        raise ValueError(f"heatmaps: expected float32, got {heatmaps.dtype}")
    return _native.peak_centroids(np.ascontiguousarray(heatmaps), num_threads)
