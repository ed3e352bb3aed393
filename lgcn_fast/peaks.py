"""Reference of the peak finder: heatmaps to points, in NumPy. The fast one is `lgcn_fast_kernels.peak_centroids`."""

import numpy as np

RADIUS = 2
"""The window around a peak is 5 x 5 pixels."""


def peak_centroids(heatmaps: np.ndarray, num_threads: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Find the maximum of every heatmap, to a fraction of a pixel.

    The point is the centroid of the 5 x 5 window around the first largest pixel (rows first), cut at the border to a
    window symmetric about the pixel, so that a border does not pull the point inwards. Weights are the values minus the
    window's smallest: the kernel K (Eq. 1) stands on a wide foot that would pull the centroid to the window's middle.
    In a constant window the point is the pixel. NaN counts as minus infinity.

    Args:
        heatmaps: (B, N, H, W) float32.
        num_threads: for the fast version; the result does not depend on it.

    Returns:
        points (B, N, 2) float32, x and y in pixels; values (B, N) float32 of the largest pixels.
    """
    batch, channels, height, width = heatmaps.shape
    points = np.empty((batch, channels, 2), np.float32)
    values = np.empty((batch, channels), np.float32)
    for b, n in np.ndindex(batch, channels):
        heatmap = np.where(np.isnan(heatmaps[b, n]), -np.inf, heatmaps[b, n])
        y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
        dy, dx = min(RADIUS, y, height - 1 - y), min(RADIUS, x, width - 1 - x)
        window = heatmap[y - dy : y + dy + 1, x - dx : x + dx + 1].astype(np.float64)
        values[b, n] = heatmap[y, x]
        points[b, n] = x, y
        if not np.isfinite(window).all():
            continue
        weights = window - window.min()
        if weights.sum() > 0:
            rows, columns = np.mgrid[-dy : dy + 1, -dx : dx + 1]
            points[b, n] += (weights * columns).sum() / weights.sum(), (weights * rows).sum() / weights.sum()
    return points, values
