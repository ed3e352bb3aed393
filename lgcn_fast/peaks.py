"""References of the peak finder: heatmaps to points and moments, on any array namespace (NumPy, CuPy, torch).

The fast ones for NumPy arrays have the same names in `lgcn_fast_kernels` (of `largest_pixels`: `peak_centroids` with a
radius of 0; of `window_centroids`: `peak_window` and `centroid` in heatmap.hpp). Coordinates are pixels, x before y.
Heatmaps have values up to 1e15, whose squares fit float32; beyond that references and fast versions may differ. NaN
counts as minus infinity.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

Array = Any
PEAK_RADIUS = 12.0
"""Half side of the window that places a landmark, pixels of the image. (A network that is not sure makes a hill whose
top says less than the whole: in windows of 5 x 5 pixels the maxima's mean error is 4 to 14 % larger.)"""


def peak_centroids(heatmaps: Array, radius: float, num_threads: int = 0) -> tuple[Array, Array]:
    """Find the maximum of every heatmap, to a fraction of a pixel.

    The point is that of `window_centroids` around the first largest pixel (rows first), of all values above 0.

    Args:
        heatmaps: (B, N, H, W) floating point, at least one pixel.
        radius: half side of the window, pixels of the heatmaps.
        num_threads: for the fast version; the result does not depend on it.

    Returns:
        points (B, N, 2), x and y in pixels; values (B, N) of the largest pixels.
    """
    pixels, values = largest_pixels(heatmaps)
    points, _ = window_centroids(heatmaps, pixels, radius)
    return points, values


def largest_pixels(heatmaps: Array) -> tuple[Array, Array]:
    """Find the largest pixel of every heatmap, the first of several (rows first).

    Args:
        heatmaps: (B, N, H, W) floating point, at least one pixel.

    Returns:
        pixels (B, N, 2), x and y, dtype of the heatmaps; values (B, N).
    """
    xp = array_namespace(heatmaps)
    batch, channels, height, width = heatmaps.shape
    flat = xp.reshape(_without_nan(heatmaps), (batch, channels, height * width))
    index = xp.argmax(flat, axis=2)
    return xp.astype(xp.stack([index % width, index // width], axis=-1), heatmaps.dtype), xp.max(flat, axis=2)


def window_centroids(heatmaps: Array, centres: Array, radius: float, threshold: float = 0.0) -> tuple[Array, Array]:
    """Find where a heatmap is high around a point: the centroid of the squares of its values in a window.

    Squares, because they are the weights of section 3.3: the point is where the equations of the window's pixels alone
    put the landmark. At a border the window is cut to one that is symmetric about the centre, so that the border does
    not pull the point inwards. Where no value is above the threshold, or the centre lies outside (by more than a
    quarter of a pixel), the point is the centre and the value 0.

    Args:
        heatmaps: (B, N, H, W) floating point, at least one pixel.
        centres: (B, N, 2), pixels, finite.
        radius: half side of the window, pixels.

    Returns:
        points (B, N, 2), dtype of the centres; values (B, N) of the pixels nearest to them.
    """
    xp = array_namespace(heatmaps, centres)
    batch, channels, height, width = heatmaps.shape
    last = xp.asarray([width - 1, height - 1], dtype=centres.dtype, device=device(heatmaps))
    to_border = xp.minimum(centres, last - centres) + 0.5
    moments = _moments(heatmaps, centres, xp.where(to_border < radius, to_border, radius), threshold)
    total = moments[..., :1]
    found = total > 0
    points = xp.astype(xp.where(found, moments[..., 1:] / xp.where(found, total, 1.0), 0.0), centres.dtype)
    nearest = xp.astype(xp.floor(points + 0.5), xp.int64)
    flat = xp.reshape(_without_nan(heatmaps), (batch, channels, height * width))
    values = xp.take_along_axis(flat, nearest[..., 1:] * width + nearest[..., :1], axis=2)
    return xp.where(found, points, centres), xp.where(found, values, 0.0)[..., 0]


def local_maxima(heatmaps: Array, threshold: float, num_threads: int = 0) -> tuple[Array, Array, Array]:
    """Find all local maxima above a threshold.

    A local maximum is larger than the neighbours before it (rows first) and not smaller than those after it, of eight:
    of a flat top with straight sides, the first pixel.

    Args:
        heatmaps: (B, N, H, W) floating point, at least one pixel.

    Returns:
        maps (M, 2) integers, face and landmark of each maximum; pixels (M, 2) integers, x and y; values (M,). In the
        order of the arrays.
    """
    xp = array_namespace(heatmaps)
    heatmaps = _without_nan(heatmaps)
    channels, height, width = heatmaps.shape[1:]
    face, landmark, y, x = xp.nonzero(_is_local_maximum(heatmaps) & (heatmaps > threshold))
    index = ((face * channels + landmark) * height + y) * width + x
    values = xp.take(xp.reshape(heatmaps, (-1,)), index, axis=0)
    return xp.stack([face, landmark], axis=1), xp.stack([x, y], axis=1), values


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
    if centres is None:
        centres, radius = xp.zeros((*heatmaps.shape[:2], 2), dtype=xp.float64, device=device(heatmaps)), xp.inf
    return _moments(heatmaps, centres, xp.full_like(centres, radius), threshold)


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


def _moments(heatmaps: Array, centres: Array, reach: Array, threshold: float) -> Array:
    """`window_moments` of windows that reach (B, N, 2) pixels along x and along y."""
    xp = array_namespace(heatmaps)
    counts = (heatmaps > threshold) & (heatmaps < xp.inf)
    weights = xp.where(counts, xp.astype(heatmaps, xp.float64), 0.0) ** 2
    lines = []
    for axis, length in enumerate((heatmaps.shape[3], heatmaps.shape[2])):
        position = xp.arange(length, dtype=xp.float64, device=device(heatmaps))
        distance = xp.abs(position - xp.astype(centres[..., axis, None], xp.float64))
        inside = xp.astype(distance <= xp.astype(reach[..., axis, None], xp.float64), xp.float64)
        lines.append(xp.stack([inside, inside * position], axis=-1))
    columns, rows = lines  # (B, N, W, 2) and (B, N, H, 2): indicator of the window, and coordinate within it
    sums = xp.matmul(xp.matmul(xp.matrix_transpose(rows), weights), columns)
    return xp.stack([sums[..., 0, 0], sums[..., 0, 1], sums[..., 1, 0]], axis=-1)


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
