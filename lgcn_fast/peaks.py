"""References of the peak finder: heatmaps to points and moments, on any array namespace (NumPy, CuPy, torch).

The fast ones for NumPy arrays have the same names in `lgcn_fast_kernels`. Coordinates are pixels, x before y; NaN in a
heatmap counts as minus infinity.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

Array = Any
RADIUS = 2
"""The window around a peak is 5 x 5 pixels."""


def peak_centroids(heatmaps: Array, num_threads: int = 0) -> tuple[Array, Array]:
    """Find the maximum of every heatmap, to a fraction of a pixel.

    The point is the centroid of the 5 x 5 window around the first largest pixel (rows first), cut at the border to a
    window symmetric about the pixel, so that a border does not pull the point inwards. Weights are the values minus the
    window's smallest: the kernel K (Eq. 1) stands on a wide foot that would pull the centroid to the window's middle.
    In a constant window, or one with an infinite value, the point is the pixel.

    Args:
        heatmaps: (B, N, H, W) floating point, at least one pixel.
        num_threads: for the fast version; the result does not depend on it.

    Returns:
        points (B, N, 2), x and y in pixels; values (B, N) of the largest pixels.
    """
    xp = array_namespace(heatmaps)
    heatmaps = _without_nan(heatmaps)
    batch, channels, height, width = heatmaps.shape
    index = xp.argmax(xp.reshape(heatmaps, (batch, channels, height * width)), axis=2)
    return _centroids(heatmaps, index)


def nearest_peaks(heatmaps: Array, targets: Array, threshold: float = 0.0, num_threads: int = 0) -> tuple[Array, Array]:
    """Find the local maximum above a threshold that is nearest to a target in every heatmap.

    A local maximum is larger than the neighbours before it (rows first) and not smaller than those after it, of eight:
    of a flat top with straight sides, the first pixel. Distances are from pixel to target; of equal ones the first
    pixel counts. Where there is no local maximum above the threshold, the point is the target and the value 0.

    Args:
        heatmaps: (B, N, H, W) floating point, at least one pixel.
        targets: (B, N, 2), pixels, finite.

    Returns:
        points (B, N, 2), centroids as in `peak_centroids`; values (B, N) of their pixels.
    """
    xp = array_namespace(heatmaps, targets)
    heatmaps = _without_nan(heatmaps)
    batch, channels, height, width = heatmaps.shape
    kind = {"dtype": targets.dtype, "device": device(heatmaps)}
    dx = xp.arange(width, **kind) - targets[..., 0, None]
    dy = xp.arange(height, **kind) - targets[..., 1, None]
    distance = dy[..., :, None] ** 2 + dx[..., None, :] ** 2
    peak = _is_local_maximum(heatmaps) & (heatmaps > threshold)
    distance = xp.reshape(xp.where(peak, distance, xp.inf), (batch, channels, height * width))
    points, values = _centroids(heatmaps, xp.argmin(distance, axis=2))
    found = xp.min(distance, axis=2) < xp.inf
    return xp.where(found[..., None], points, xp.astype(targets, points.dtype)), xp.where(found, values, 0.0)


def local_maxima(heatmaps: Array, threshold: float, num_threads: int = 0) -> tuple[Array, Array, Array]:
    """Find all local maxima above a threshold, as defined in `nearest_peaks`.

    Args:
        heatmaps: (B, N, H, W) floating point, at least one pixel.

    Returns:
        maps (M, 2) integers, face and landmark of each maximum; points (M, 2), centroids as in `peak_centroids`;
        values (M,) of their pixels. In the order of the arrays.
    """
    xp = array_namespace(heatmaps)
    heatmaps = _without_nan(heatmaps)
    batch, channels, height, width = heatmaps.shape
    face, landmark, y, x = xp.nonzero(_is_local_maximum(heatmaps) & (heatmaps > threshold))
    flat = xp.reshape(heatmaps, (1, batch * channels, height * width))[0, ...]
    chosen = xp.reshape(xp.take(flat, face * channels + landmark, axis=0), (1, -1, height, width))
    points, values = _centroids(chosen, (y * width + x)[None, :])
    return xp.stack([face, landmark], axis=1), points[0, ...], values[0, ...]


def window_moments(
    heatmaps: Array, centres: Array | None = None, radius: float = 0, threshold: float = 0.01, num_threads: int = 0
) -> Array:
    """Moments of the squared heatmaps, as a weighted least-squares fit to their pixels needs them (section 3.3).

    Sums of w^2, w^2 x and w^2 y over the pixels with a value w above the threshold, in a square window.

    Args:
        heatmaps: (B, N, H, W) floating point, at least one pixel.
        centres: (B, N, 2), pixels, finite: only pixels at most `radius` from it along x and along y count.
            None: all pixels.

    Returns:
        (B, N, 3) float64: sums of w^2, w^2 x, w^2 y.
    """
    xp = array_namespace(heatmaps)
    weights = xp.where(heatmaps > threshold, xp.astype(heatmaps, xp.float64), 0.0) ** 2
    lines = []
    for axis, length in enumerate((heatmaps.shape[3], heatmaps.shape[2])):
        position = xp.arange(length, dtype=xp.float64, device=device(heatmaps))
        inside = xp.ones_like(position)
        if centres is not None:
            inside = xp.astype(xp.abs(position - xp.astype(centres[..., axis, None], xp.float64)) <= radius, xp.float64)
        lines.append(xp.stack([inside, inside * position], axis=-1))
    columns, rows = lines  # (W, 2) or (B, N, W, 2): indicator of the window, and coordinate within it
    sums = xp.matmul(xp.matmul(xp.matrix_transpose(rows), weights), columns)
    return xp.stack([sums[..., 0, 0], sums[..., 0, 1], sums[..., 1, 0]], axis=-1)


def face_votes(
    heatmaps: np.ndarray, offsets: np.ndarray, voters: Sequence[int], step: int = 1, num_threads: int = 0
) -> np.ndarray:
    """Votes of heatmaps for the middle of a face: their mean, each shifted by where its landmark sits.

    Args:
        heatmaps: (B, N, H, W) float32; a vote is at least 0 and at most 1.
        offsets: (S, N, 2) integers: where the landmarks of a face of each of S sizes sit from its middle, x and y, in
            pixels of the votes.
        voters: the landmarks that vote.
        step: votes are counted in every step-th row and column.

    Returns:
        (B, S, h, w) float32 in 0..1; h and w are H and W over `step`, rounded up.
    """
    seen = np.nan_to_num(heatmaps[:, :, ::step, ::step]).clip(0, 1)
    height, width = seen.shape[2:]
    votes = np.zeros((len(seen), len(offsets), height, width), np.float32)
    for size, places in enumerate(offsets):
        for landmark in voters:
            dx, dy = places[landmark]
            to_y, to_x, from_y, from_x = max(-dy, 0), max(-dx, 0), max(dy, 0), max(dx, 0)
            rows, columns = max(height - abs(dy), 0), max(width - abs(dx), 0)
            shifted = seen[:, landmark, from_y : from_y + rows, from_x : from_x + columns]
            votes[:, size, to_y : to_y + rows, to_x : to_x + columns] += shifted / len(voters)
    return votes


def _without_nan(heatmaps: Array) -> Array:
    xp = array_namespace(heatmaps)
    return xp.where(xp.isnan(heatmaps), -xp.inf, heatmaps)


def _is_local_maximum(heatmaps: Array) -> Array:
    xp = array_namespace(heatmaps)
    height, width = heatmaps.shape[2:]
    column = xp.full((*heatmaps.shape[:3], 1), -xp.inf, dtype=heatmaps.dtype, device=device(heatmaps))
    wide = xp.concat([column, heatmaps, column], axis=3)
    row = xp.full((*heatmaps.shape[:2], 1, width + 2), -xp.inf, dtype=heatmaps.dtype, device=device(heatmaps))
    padded = xp.concat([row, wide, row], axis=2)
    is_maximum = heatmaps > -xp.inf
    for j in range(3):
        for i in range(3):
            neighbour = padded[:, :, j : j + height, i : i + width]
            if (j, i) < (1, 1):
                is_maximum = is_maximum & (heatmaps > neighbour)
            elif (j, i) > (1, 1):
                is_maximum = is_maximum & (heatmaps >= neighbour)
    return is_maximum


def _centroids(heatmaps: Array, index: Array) -> tuple[Array, Array]:
    """Centroids of the windows around pixels (B, N) of flattened heatmaps, and the pixels' values."""
    xp = array_namespace(heatmaps)
    batch, channels, height, width = heatmaps.shape
    flat = xp.reshape(heatmaps, (batch, channels, height * width))
    x, y = index % width, index // width
    reach_x = xp.minimum(x, width - 1 - x)[..., None]
    reach_y = xp.minimum(y, height - 1 - y)[..., None]
    steps = xp.arange(-RADIUS, RADIUS + 1, device=device(heatmaps))
    dy = xp.reshape(xp.broadcast_to(steps[:, None], (5, 5)), (25,))
    dx = xp.reshape(xp.broadcast_to(steps[None, :], (5, 5)), (25,))
    inside = (xp.abs(dx) <= reach_x) & (xp.abs(dy) <= reach_y)
    window = xp.take_along_axis(flat, xp.where(inside, index[..., None] + dy * width + dx, index[..., None]), axis=2)
    window = xp.astype(window, xp.float64)
    finite = xp.all(xp.isfinite(window), axis=2, keepdims=True)
    window = xp.where(finite, window, 0.0)
    # Outside the window stands the peak's own value, which is never the smallest.
    weights = xp.where(inside, window - xp.min(window, axis=2, keepdims=True), 0.0)
    total = xp.sum(weights, axis=2, keepdims=True)
    weights = weights / xp.where(total > 0, total, 1.0)
    shift_x = xp.sum(weights * xp.astype(dx, xp.float64), axis=2)
    shift_y = xp.sum(weights * xp.astype(dy, xp.float64), axis=2)
    points = xp.stack([xp.astype(x, xp.float64) + shift_x, xp.astype(y, xp.float64) + shift_y], axis=-1)
    values = xp.take_along_axis(flat, index[..., None], axis=2)[..., 0]
    return xp.astype(points, heatmaps.dtype), values
