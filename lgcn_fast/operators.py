"""The kernel convolution of section 3.2.2: `gaussian_sum` to be read, the others to be fast."""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

import lgcn_fast_kernels
from lgcn_fast_kernels import INSTRUCTIONS

KERNEL_SIZE = 45
SIGMAS = (1.0, 3.0, 5.0, 7.0, 9.0)
NEGLIGIBLE = 1e-16
"""Taps below this are 0. No sum in double precision notices them; but in single precision products with them are
subnormal numbers, with which a processor is many times slower."""


def gaussian_taps(kernel_size: int = KERNEL_SIZE, sigmas: tuple[float, ...] = SIGMAS) -> Tensor:
    """The one-dimensional Gaussians whose outer products add up to the kernel of Eq. 1.

    Eq. 1 (section 3.2.2) for S sigmas, with a maximum of 1 in the centre:

        K = 2 pi / S * sum_s sigma_s^2 N_2(0, sigma_s^2) = 1 / S * sum_s exp(-x^2 / 2 sigma_s^2) exp(-y^2 / 2 sigma_s^2)

    Truncation to a square keeps each term separable, so K is exactly `sum_s outer(taps[s], taps[s])`; but for what is
    `NEGLIGIBLE` in the taps.

    Returns:
        (S, kernel_size) float64.
    """
    x = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
    sigma = torch.tensor(sigmas, dtype=torch.float64)[:, None]
    taps = torch.exp(-(x**2) / (2 * sigma**2)) / len(sigmas) ** 0.5
    return torch.where(taps < NEGLIGIBLE, 0.0, taps)


def gaussian_sum(x: Tensor, kernel_size: int = KERNEL_SIZE, sigmas: tuple[float, ...] = SIGMAS) -> Tensor:
    """Convolve every channel with the sum of Gaussians K of Eq. 1 (section 3.2.2), zero padded.

    Args:
        x: (B, C, H, W) floating point.
        kernel_size: side of the truncated kernel in pixels, odd.
        sigmas: standard deviations of the Gaussians, in pixels.

    Returns:
        (B, C, H, W), dtype of `x`.
    """
    taps = gaussian_taps(kernel_size, sigmas)
    kernel = torch.einsum("sy,sx->yx", taps, taps).to(x)
    channels = x.shape[1]
    weight = kernel.expand(channels, 1, kernel_size, kernel_size)
    return F.conv2d(x, weight, padding=kernel_size // 2, groups=channels)


def gaussian_sum_banded(x: Tensor, kernel_size: int = KERNEL_SIZE, sigmas: tuple[float, ...] = SIGMAS) -> Tensor:
    """Convolve every channel with the sum of Gaussians K of Eq. 1 (section 3.2.2), zero padded.

    A zero-padded 1-D convolution of a line of length L is a banded L x L matrix T_s, so that
    `K * X = sum_s T_s X T_s`: two matrix products. K is symmetric, so the gradient is the same operation.

    Args:
        x: (B, C, H, W) floating point.
        kernel_size: side of the truncated kernel in pixels, odd.
        sigmas: standard deviations of the Gaussians, in pixels.

    Returns:
        (B, C, H, W), dtype of `x` (under autocast: the autocast dtype).
    """
    return _GaussianSum.apply(_autocast(x), banded_product, kernel_size, tuple(sigmas))


def gaussian_sum_native(x: Tensor, kernel_size: int = KERNEL_SIZE, sigmas: tuple[float, ...] = SIGMAS) -> Tensor:
    """Convolve every channel with the sum of Gaussians K of Eq. 1 (section 3.2.2), zero padded, on a CPU.

    With `lgcn_fast_kernels.gaussian_sum`, forward and backward: two to three times as fast as `gaussian_sum_banded`.

    Args:
        x: (B, C, H, W) fp32 or bf16, on a CPU.
        kernel_size: side of the truncated kernel in pixels, odd.
        sigmas: standard deviations of the Gaussians, in pixels.

    Returns:
        (B, C, H, W), dtype of `x` (under autocast: the autocast dtype).
    """
    return _GaussianSum.apply(_autocast(x), _native_product, kernel_size, tuple(sigmas))


@lru_cache(maxsize=64)
def band_matrices(
    length: int, kernel_size: int, sigmas: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The matrices T_s of `gaussian_sum_banded`, symmetric: (S, length, length)."""
    index = torch.arange(length)
    with torch.inference_mode(False):
        return bands(gaussian_taps(kernel_size, sigmas), index, index).to(device, dtype)


def bands(taps: Tensor, out: Tensor, into: Tensor) -> Tensor:
    """What the pixels at some places of a line give to those at others in 1-D convolutions.

    Args:
        taps: (S, kernel_size).
        out: (M,) integers, pixels.
        into: (L,) integers, pixels.

    Returns:
        (S, M, L), dtype of `taps`.
    """
    count, kernel_size = taps.shape
    offset = out[:, None] - into[None, :] + kernel_size // 2
    inside = (offset >= 0) & (offset < kernel_size)
    index = torch.where(inside, offset, kernel_size).flatten()
    return F.pad(taps, (0, 1)).index_select(1, index).view(count, out.shape[0], into.shape[0])


def banded_product(x: Tensor, kernel_size: int, sigmas: tuple[float, ...]) -> Tensor:
    """`gaussian_sum_banded` without its own gradient."""
    height, width = x.shape[2:]
    rows = band_matrices(height, kernel_size, sigmas, x.dtype, x.device)
    return two_products(x, rows, band_matrices(width, kernel_size, sigmas, x.dtype, x.device))


def two_products(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`sum_s rows[s] X columns[s]^T` for every channel X.

    Args:
        x: (B, C, H, W) floating point.
        rows: (S, M, H).
        columns: (S, L, W).

    Returns:
        (B, C, M, L), dtype of `x`.
    """
    batch, channels, height, width = x.shape
    count, new_height, _ = rows.shape
    new_width = columns.shape[1]
    # (W, S * L): one product blurs all lines along x with all sigmas.
    along_x = x.reshape(-1, width) @ columns.permute(2, 0, 1).reshape(width, count * new_width)
    # (M, H * S): one product blurs along y and adds up the sigmas, with the lines as the first product leaves them.
    along_x = along_x.view(batch * channels, height * count, new_width)
    along_y = torch.matmul(rows.permute(1, 2, 0).reshape(new_height, height * count), along_x)
    return along_y.view(batch, channels, new_height, new_width)


def _native_product(x: Tensor, kernel_size: int, sigmas: tuple[float, ...]) -> Tensor:
    maps = x.detach().float().contiguous().numpy()
    precision = "bf16" if x.dtype == torch.bfloat16 and "bf16" in INSTRUCTIONS else "fp32"
    instructions = INSTRUCTIONS[precision]
    blurred = lgcn_fast_kernels.gaussian_sum(maps, kernel_size, sigmas, torch.get_num_threads(), instructions)
    return torch.from_numpy(blurred).to(x.dtype)


def _autocast(x: Tensor) -> Tensor:
    enabled = torch.is_autocast_enabled(x.device.type)
    return x.to(torch.get_autocast_dtype(x.device.type)) if enabled else x


class _GaussianSum(torch.autograd.Function):
    """A product with the symmetric kernel for autograd: nothing is saved, the backward pass is the forward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, product: Callable[..., Tensor], kernel_size: int, sigmas: tuple[float, ...]) -> Tensor:
        ctx.product, ctx.kernel = product, (kernel_size, sigmas)
        return product(x, kernel_size, sigmas)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.product(gradient, *ctx.kernel), None, None, None
