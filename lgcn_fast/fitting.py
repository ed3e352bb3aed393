"""The fit of section 3.3: heatmaps to landmarks by weighted least squares with a shape model, batched over faces.

Written once for any array namespace (NumPy, CuPy, torch): nothing in it waits for a device or branches on values.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

import lgcn_fast_kernels
from lgcn_fast_kernels import cuda_fit

from . import peaks
from .images import BOX_ENLARGEMENT
from .peaks import Array
from .shape import ShapeModel, similarity_basis

RADII = (None, 20.0, 7.0)
"""Half sides of the windows of the three rounds, pixels of the image: all, then those near the last prediction."""
THRESHOLD = 0.01
"""Pixels up to this value do not count."""
CERTAIN = 0.1
"""Heatmap maxima of at least this value give the first rotation and size."""
FALLBACK = 10
"""The best maxima that do, where fewer than two are certain."""
NOISE = 50.0
"""What a pixel's equation is worth against the prior: square pixels of the image, times the sum of squared weights of
a landmark. A perfect heatmap has a sum of 54 within 7 px, those of the models that ship 47 to 49 (medians)."""
LARGEST_MOVE = 5.0
"""Where a heatmap is high further than this from the shape, along x or y, pixels of the image, it is a false peak."""
SIZE_SPREAD, SHIFT_SPREAD = 0.3, 1.0
"""Prior standard deviations: of size and turn, as a share of the first guess; of the position, as a share of the
heatmap's side."""


@dataclass(frozen=True)
class Fit:
    """Landmarks of a batch of faces, fitted to their heatmaps."""

    points: Array
    """(B, N, 2), pixels: the shape, drawn to where the heatmaps are high around it (`peaks.window_centroids`), as
    far as the network is certain there."""
    shapes: Array
    """(B, N, 2), pixels: the shape model's own points."""
    coefficients: Array
    """(B, K): of the modes, in units of their standard deviations in the training shapes."""
    certainties: Array
    """(B, N) in 0..1: the heatmap's value there; 0 where it is nowhere high, or not within `LARGEST_MOVE`."""
    residuals: Array
    """(B,): root mean square distance from the shape to where the heatmaps are high, weighted by the certainties, over
    the face's size; infinite where no landmark has any certainty."""


@dataclass(frozen=True)
class _Guess:
    """Where the faces are thought to be before a round, as a prior on its unknowns."""

    cos: Array
    sin: Array
    """(B,) of the rotation R of the shape model's frame against the image."""
    size: Array
    """(B,) of the faces, see `ShapeModel`."""


def fit(model: ShapeModel, heatmaps: Array, stride: int = 1) -> Fit:
    """Fit a shape model to heatmaps (section 3.3): rotation, then least squares over all pixels, 20 px and 7 px.

    Args:
        model: shape model with N landmarks.
        heatmaps: (B, N, H, W) floating point, at least one pixel.
        stride: side of a heatmap's pixel in pixels of the image, see `LGCNConfig.stride`.

    Returns:
        `Fit` with arrays of the heatmaps' namespace, in pixels of the heatmaps, finite for any heatmaps of values up to
        1e4; without any evidence it is the mean face in the middle.

    Raises:
        ValueError: another number of landmarks, dimensions or pixels.
    """

    basis = _basis(model, heatmaps)
    products = basis_products(basis)

    def solve(guess: _Guess, prior: Array, precision: Array, centres: Array, radius: float) -> Array:
        moments = peaks.window_moments(heatmaps, centres, radius, THRESHOLD)
        return solve_moments(basis, products, guess.cos, guess.sin, prior, precision, moments)

    return _fit(model, heatmaps, basis, stride, solve)


def fit_reference(model: ShapeModel, heatmaps: np.ndarray, stride: int = 1) -> Fit:
    """What `fit` computes, with the equations of all pixels written out and solved one face at a time in float64."""

    basis = _basis(model, heatmaps)

    def solve(guess, prior, precision, centres, radius):
        per_face = zip(guess.cos, guess.sin, prior, precision, heatmaps, strict=True)
        windows = [None] * len(heatmaps) if centres is None else centres
        return np.stack([solve_pixels(basis, *face, c, radius) for face, c in zip(per_face, windows, strict=True)])

    return _fit(model, heatmaps, basis, stride, solve)


class NativeFitter:
    """`fit` for NumPy float32 heatmaps, in native code; everything that depends on the model alone is computed once."""

    def __init__(self, model: ShapeModel) -> None:
        self.native = _native_fitter(model)
        self.num_landmarks = model.num_landmarks

    def __call__(self, heatmaps: np.ndarray, stride: int = 1, num_threads: int = 0) -> Fit:
        """Fit the shape model to heatmaps; arguments, result and errors as in `fit`.

        Args:
            num_threads: 0: all cores; the result does not depend on it.
        """
        _check_heatmaps(heatmaps, self.num_landmarks)
        return Fit(*self.native.fit(np.ascontiguousarray(heatmaps, np.float32), stride, num_threads))


class CudaFitter:
    """`fit` for heatmaps on an NVIDIA GPU, in one launch; needs CuPy, which compiles it here.

    Args:
        device: "cuda", or one of several such as "cuda:1".

    Raises:
        ImportError: without CuPy.
        ValueError: a device of another kind, or more landmarks than fit the device's shared memory (some thousands).
    """

    def __init__(self, model: ShapeModel, device: Any = "cuda") -> None:
        self.kernel = cuda_fit.CudaFitter(_native_fitter(model), device)
        self.num_landmarks = model.num_landmarks

    def __call__(self, heatmaps: Array, peaks: Array, stride: int = 1, out: Fit | None = None) -> Fit:
        """Fit the shape model to heatmaps, on torch's current stream and without waiting for it.

        Args:
            heatmaps: (B, N, H, W) float32 torch tensor on the device, contiguous, at least one pixel.
            peaks: (B, N, 6) float32, likewise: of every heatmap x, y and value of the first largest pixel, and the
                moments of `peaks.window_moments` over all pixels above `THRESHOLD`.
            stride: side of a heatmap's pixel in pixels of the image, see `LGCNConfig.stride`.
            out: float32 tensors to write to.

        Returns:
            `Fit` with float32 torch tensors on the device: `out` where it is given.

        Raises:
            ValueError: another shape, dtype, layout or device.
        """
        _check_heatmaps(heatmaps, self.num_landmarks)
        arrays = None if out is None else tuple(getattr(out, field.name) for field in fields(Fit))
        return Fit(*self.kernel.fit(heatmaps, peaks, stride, arrays))


def fitter_constants(model: ShapeModel) -> dict[str, Any]:
    """What a native fitter is built from (`lgcn::Fitter` in csrc/fit.hpp).

    Returns:
        basis (P, N, 2) float64; variances (P - 4,) float64; radii; then the members of `lgcn::FitOptions`, in order.
    """
    return {
        "basis": _model_basis(model),
        "variances": np.asarray(model.variances, np.float64),
        "radii": RADII[1:],
        "certain": CERTAIN,
        "fallback": FALLBACK,
        "noise": NOISE,
        "peak_radius": peaks.PEAK_RADIUS,
        "largest_move": LARGEST_MOVE,
        "size_spread": SIZE_SPREAD,
        "shift_spread": SHIFT_SPREAD,
        "threshold": THRESHOLD,
        "nominal_size": _nominal_size(model),
    }


def _native_fitter(model: ShapeModel) -> lgcn_fast_kernels.Fitter:
    return lgcn_fast_kernels.Fitter(**fitter_constants(model))


def basis_products(basis: Array) -> tuple[Array, Array]:
    """`B_i^T B_i` of every landmark, as `solve_moments` needs them: symmetric, so half of each.

    Args:
        basis: (P, N, 2).

    Returns:
        products (P (P + 1) / 2, N); places (P * P,), where in them each element of a (P, P) matrix stands.
    """
    xp = array_namespace(basis)
    count = basis.shape[0]
    rows, columns = np.triu_indices(count)
    places = np.empty((count, count), np.int64)
    places[rows, columns] = places[columns, rows] = np.arange(len(rows))
    left, right = (xp.take(basis, xp.asarray(i, device=device(basis)), axis=0) for i in (rows, columns))
    return xp.sum(left * right, axis=2), xp.asarray(places.ravel(), device=device(basis))


def solve_moments(
    basis: Array,
    products: tuple[Array, Array],
    cos: Array,
    sin: Array,
    prior: Array,
    precision: Array,
    moments: Array,
) -> Array:
    """Weighted least squares over pixels, from their moments alone.

    In the frame of the shape model, turned by R against the image, the point of landmark i is `q_i = B_i theta` with
    the (2, P) rows B_i of the basis. Every pixel at x with value w is an equation `w q_i = w R^T x`, so the error is

        sum_i sum_pixels w^2 |B_i theta - R^T x|^2 + (theta - prior)^T diag(precision) (theta - prior)

    and setting its derivative to zero leaves P equations. All pixels of a landmark share B_i, so only sums over them
    remain: with S_i = sum w^2 and V_i = sum w^2 x,

        (sum_i S_i B_i^T B_i + diag(precision)) theta = sum_i B_i^T R^T V_i + diag(precision) prior.

    Args:
        basis: (P, N, 2).
        products: see `basis_products`.
        cos: (B,) of the rotation R.
        sin: (B,).
        prior: (B, P).
        precision: (B, P), positive.
        moments: (B, N, 3): S_i and the two parts of V_i, see `peaks.window_moments`.

    Returns:
        theta (B, P).
    """
    xp = array_namespace(basis, moments)
    count = basis.shape[0]
    # No matrix product: BLAS would start threads for it that are still spinning when the next round needs the cores.
    halves = xp.vecdot(moments[:, None, :, 0], products[0][None, ...])
    left = xp.reshape(xp.take(halves, products[1], axis=1), (-1, count, count))
    left = left + precision[:, :, None] * xp.eye(count, dtype=basis.dtype, device=device(basis))
    cos, sin = cos[:, None], sin[:, None]
    turned_x = cos * moments[..., 1] + sin * moments[..., 2]
    turned_y = cos * moments[..., 2] - sin * moments[..., 1]
    right = xp.matmul(turned_x, xp.matrix_transpose(basis[..., 0])) + precision * prior
    right = right + xp.matmul(turned_y, xp.matrix_transpose(basis[..., 1]))
    return xp.linalg.solve(left, right[..., None])[..., 0]


def solve_pixels(
    basis: np.ndarray,
    cos: float,
    sin: float,
    prior: np.ndarray,
    precision: np.ndarray,
    heatmaps: np.ndarray,
    centres: np.ndarray | None,
    radius: float,
) -> np.ndarray:
    """What `solve_moments` computes for one face, with one pair of equations for each pixel.

    Args:
        heatmaps: (N, H, W).
        centres: (N, 2) and `radius` choose the pixels, see `peaks.window_moments`.

    Returns:
        theta (P,).
    """
    rows, values = [np.diag(np.sqrt(precision))], [np.sqrt(precision) * prior]
    for index, heatmap in enumerate(heatmaps.astype(np.float64)):
        y, x = np.nonzero(heatmap > THRESHOLD)
        if centres is not None:
            near = (np.abs(x - centres[index, 0]) <= radius) & (np.abs(y - centres[index, 1]) <= radius)
            y, x = y[near], x[near]
        w = heatmap[y, x]
        for axis, target in enumerate((cos * x + sin * y, cos * y - sin * x)):
            rows.append(w[:, None] * basis[None, :, index, axis])
            values.append(w * target)
    return np.linalg.lstsq(np.concatenate(rows), np.concatenate(values))[0]


def _check_heatmaps(heatmaps: Array, num_landmarks: int) -> None:
    if heatmaps.ndim != 4 or heatmaps.shape[1] != num_landmarks or 0 in heatmaps.shape[2:]:
        expected = f"(B, {num_landmarks}, H, W) with at least one pixel"
        raise ValueError(f"heatmaps: expected {expected}, got {tuple(heatmaps.shape)}")


def _model_basis(model: ShapeModel) -> np.ndarray:
    """What the unknowns do to the points, (P, N, 2) float64: size, turn, two shifts, and the modes."""
    return np.concatenate([similarity_basis(model.mean), model.modes]).astype(np.float64)


def _basis(model: ShapeModel, heatmaps: Array) -> Array:
    _check_heatmaps(heatmaps, model.num_landmarks)
    return array_namespace(heatmaps).asarray(_model_basis(model), device=device(heatmaps))


def _nominal_size(model: ShapeModel) -> float:
    """Size of a face that fills a heatmap of one pixel a side."""
    return 1 / BOX_ENLARGEMENT / max(float(np.ptp(model.mean, axis=0).max()), 1e-6)


def _fit(
    model: ShapeModel,
    heatmaps: Array,
    basis: Array,
    stride: int,
    solve: Callable,
) -> Fit:
    xp = array_namespace(heatmaps)
    variances = xp.asarray(model.variances, dtype=xp.float64, device=device(heatmaps))
    height, width = heatmaps.shape[2:]
    guess = _first_guess(model, *peaks.largest_pixels(heatmaps), max(height, width))
    shapes = None
    for radius in RADII:
        prior, precision = _prior(guess, variances, height, width)
        # Square pixels times a sum over pixels: both are fewer by the square of the stride.
        theta = solve(guess, prior, precision / stride**4, shapes, (radius or 0.0) / stride)
        shapes = _shapes(basis, guess, theta)
        coefficients = theta[:, 4:] / (guess.size[:, None] * variances**0.5)
        guess = _next_guess(guess, theta)
    points, values = peaks.window_centroids(heatmaps, shapes, peaks.PEAK_RADIUS / stride, THRESHOLD)
    # What is further away is a false peak, however high.
    near = xp.max(xp.abs(points - shapes), axis=2) <= LARGEST_MOVE / stride
    certainties = xp.where(near, xp.clip(xp.astype(values, xp.float64), 0.0, 1.0), 0.0)
    total = xp.sum(certainties, axis=1)
    squared = xp.sum(certainties * xp.sum((points - shapes) ** 2, axis=2), axis=1) / xp.where(total > 0, total, 1.0)
    return Fit(
        points=shapes + certainties[..., None] * (points - shapes),
        shapes=shapes,
        coefficients=coefficients,
        certainties=certainties,
        residuals=xp.where(total > 0, xp.sqrt(squared) / guess.size, xp.inf),
    )


def _first_guess(model: ShapeModel, points: Array, values: Array, side: int) -> _Guess:
    """Rotation and size by Kabsch's algorithm from the certain maxima, or the best where fewer than two are."""
    xp = array_namespace(points)
    points, mean = xp.astype(points, xp.float64), xp.asarray(model.mean, dtype=xp.float64, device=device(points))
    rank = min(FALLBACK, values.shape[1]) - 1
    best = values >= xp.sort(values, axis=1, descending=True)[:, rank, None]
    certain = values >= CERTAIN
    enough = xp.sum(xp.astype(certain, xp.int64), axis=1, keepdims=True) >= 2
    chosen = xp.astype(xp.where(enough, certain, best), xp.float64)[..., None]
    count = xp.sum(chosen, axis=1, keepdims=True)
    target = chosen * (points - xp.sum(chosen * points, axis=1, keepdims=True) / count)
    source = chosen * (mean - xp.sum(chosen * mean, axis=1, keepdims=True) / count)
    along = xp.sum(source * target, axis=(1, 2))
    across = xp.sum(source[..., 0] * target[..., 1] - source[..., 1] * target[..., 0], axis=1)
    length = xp.hypot(along, across)
    spread = xp.sum(source**2, axis=(1, 2))
    # The size of a face that fills the heatmap; one that is far from it is no guess to build on.
    nominal = side * _nominal_size(model)
    size = xp.clip(length / xp.where(spread > 0, spread, 1.0), nominal / 4, nominal * 2)
    known = length > 1e-9
    length = xp.where(known, length, 1.0)
    return _Guess(xp.where(known, along / length, 1.0), xp.where(known, across / length, 0.0), size)


def _prior(guess: _Guess, variances: Array, height: int, width: int) -> tuple[Array, Array]:
    """Means (B, P) and precisions (B, P) of the unknowns: size, turn, position and coefficients."""
    xp = array_namespace(variances)
    middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
    size, zero = guess.size, xp.zeros_like(guess.size)
    x, y = guess.cos * middle_x + guess.sin * middle_y, guess.cos * middle_y - guess.sin * middle_x
    modes = size[:, None] * variances**0.5
    similarity = xp.stack([size, zero, x, y], axis=1)
    shift = zero + SHIFT_SPREAD * max(height, width)
    spreads = xp.stack([SIZE_SPREAD * size, SIZE_SPREAD * size, shift, shift], axis=1)
    prior = xp.concat([similarity, xp.zeros_like(modes)], axis=1)
    return prior, NOISE / xp.concat([spreads, modes], axis=1) ** 2


def _next_guess(guess: _Guess, theta: Array) -> _Guess:
    """The rotation and size that the solution of a round found."""
    xp = array_namespace(theta)
    size = xp.hypot(theta[:, 0], theta[:, 1])
    cos, sin = theta[:, 0] / size, theta[:, 1] / size
    return _Guess(guess.cos * cos - guess.sin * sin, guess.sin * cos + guess.cos * sin, size)


def _shapes(basis: Array, guess: _Guess, theta: Array) -> Array:
    """Points (B, N, 2) in the image."""
    xp = array_namespace(theta)
    x, y = xp.matmul(theta, basis[..., 0]), xp.matmul(theta, basis[..., 1])
    cos, sin = guess.cos[:, None], guess.sin[:, None]
    return xp.stack([cos * x - sin * y, sin * x + cos * y], axis=2)
