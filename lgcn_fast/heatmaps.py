"""Ground truth: landmarks to heatmaps and loss weights (paper, sections 3.1 and 3.2.4).

Coordinates, here and everywhere in this package: pixel centres at integers, 0-based, x before y. A point without a
label is NaN. Faces are padded to a common count with faces whose points are all NaN.
"""

import torch
from torch import Tensor

from .operators import KERNEL_SIZE, SIGMAS, band_matrices


def to_heatmap(points: Tensor, stride: int) -> Tensor:
    """Points in pixels of an image to pixels of its heatmaps, which are `stride` times as large."""
    return points / stride + (0.5 / stride - 0.5)


def bilinear_lines(coordinates: Tensor, length: int, visible: Tensor) -> Tensor:
    """One-hot lines, each spread linearly over the two pixels around a coordinate (beyond the centre of the first or
    last one it is in that pixel); zero where not visible.

    Args:
        coordinates: (...), pixels.
        length: pixels in a line.
        visible: (...) bool.

    Returns:
        (..., length) float32; sums to 1 where visible.
    """
    coordinates = torch.nan_to_num(coordinates).clamp(0, length - 1)
    distance = (coordinates[..., None] - torch.arange(length, device=coordinates.device)).abs()
    return (1 - distance).clamp(min=0) * visible[..., None]


def visibility(points: Tensor, height: int, width: int) -> Tensor:
    """V of Eq. 3: which points are labelled and lie in a pixel of the image.

    Args:
        points: (..., 2), pixels, NaN without a label.

    Returns:
        (...) bool.
    """
    x, y = points.unbind(-1)
    return (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)


def ground_truth(points: Tensor, height: int, width: int) -> Tensor:
    """G of section 3.1: a one-hot map per landmark, spread bilinearly over up to 4 pixels; several faces add up.

    Args:
        points: (B, faces, N, 2) float32, pixels.

    Returns:
        (B, N, H, W) float32; each visible landmark of each face adds 1 to the sum of its map.
    """
    rows, columns = _lines(points, height, width)
    return torch.einsum("bfny,bfnx->bnyx", rows, columns)


def blurred_ground_truth(
    points: Tensor, height: int, width: int, kernel_size: int = KERNEL_SIZE, sigmas: tuple[float, ...] = SIGMAS
) -> Tensor:
    """K * G of Eq. 4 without a convolution.

    G is an outer product of two lines u v^T and K * X = sum_s T_s X T_s (see `operators.gaussian_sum_banded`), so
    `K * G = sum_s (T_s u) (T_s v)^T`: a sum of outer products.

    Args:
        points: (B, faces, N, 2) float32, pixels.

    Returns:
        (B, N, H, W) float32.
    """
    rows, columns = _lines(points, height, width)
    blur_rows = band_matrices(height, kernel_size, sigmas, rows.dtype, rows.device)
    blur_columns = band_matrices(width, kernel_size, sigmas, rows.dtype, rows.device)
    rows = torch.einsum("syj,bfnj->bnyfs", blur_rows, rows).flatten(3)
    columns = torch.einsum("sxj,bfnj->bnfsx", blur_columns, columns).flatten(2, 3)
    return rows @ columns


def loss_weights(points: Tensor, height: int, width: int) -> Tensor:
    """w of Eq. 3 (section 3.2.4): `w = V + L / 10 + L / 2 mean(V)`.

    V says which landmarks are visible, L which are labelled. With several faces in an image a landmark is visible if
    it is in any face, and labelled if it is in every face (a map that lacks one face's point must not be learned).
    An image without faces is fully labelled with nothing visible: background.

    Args:
        points: (B, faces, N, 2), pixels.

    Returns:
        (B, N) float32.
    """
    has_label = ~points.isnan().any(-1)
    padding = ~has_label.any(-1, keepdim=True)
    labelled = (has_label | padding).all(1).float()
    visible = visibility(points, height, width).any(1).float() * labelled
    return visibility_weights(visible, labelled)


def visibility_weights(visible: Tensor, labelled: Tensor | float = 1.0) -> Tensor:
    """The formula of `loss_weights`.

    Args:
        visible: (B, N) float32, V of Eq. 3.
        labelled: (B, N) float32, L; a number stands for all.

    Returns:
        (B, N) float32.
    """
    return visible + labelled * (0.1 + 0.5 * visible.mean(-1, keepdim=True))


def _lines(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    x, y = points.unbind(-1)
    visible = visibility(points, height, width)
    return bilinear_lines(y, height, visible), bilinear_lines(x, width, visible)
