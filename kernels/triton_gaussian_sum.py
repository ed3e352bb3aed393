"""The kernel convolution in Triton, forward and backward, for CUDA tensors (or, with TRITON_INTERPRET=1, any).

A zero-padded convolution along a line is a banded matrix T_s, so `K * X = sum_s T_s X T_s`: one program multiplies the
blocks of a map that its part of the result sees with the bands, on tensor cores.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import BF16_TOLERANCE, kernel_taps

TOLERANCES = {torch.float32: 0.0, torch.float16: 2.0**-15, torch.bfloat16: BF16_TOLERANCE}
"""Of `kernel_taps`: an eighth of the rounding error. Fewer lines, fewer products."""
LARGEST_BLOCK = {torch.float32: 32, torch.float16: 128, torch.bfloat16: 128}
"""Rows and columns of a map that one program computes as a whole: in half precision those of 96 x 96, so that it is
read once and no product is made twice."""
PART = {torch.float32: 32, torch.float16: 64, torch.bfloat16: 64}
"""Rows or columns of a program's part of a larger one: what it sees of its neighbours needs room, too."""
NUM_STAGES = 2
"""The next band is loaded while products are made with this one."""


@triton.jit
def _inside(index, length):
    return (index >= 0) & (index < length)


@triton.jit
def _gaussian_sum_kernel(
    x_ptr,
    bands_y_ptr,
    bands_x_ptr,
    out_ptr,
    height,
    width,
    channels,
    first_side,
    COUNT: tl.constexpr,
    REACH_Y: tl.constexpr,
    REACH_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    WHOLE_SQUARE: tl.constexpr = REACH_Y == 0 and REACH_X == 0 and BLOCK_Y == BLOCK_X
    map_index = tl.program_id(0)
    start = map_index.to(tl.int64) * height * width
    is_side = map_index % channels >= first_side
    block_y, block_x = tl.program_id(1), tl.program_id(2)
    y, x = tl.arange(0, BLOCK_Y), tl.arange(0, BLOCK_X)
    rows, columns = block_y * BLOCK_Y + y, block_x * BLOCK_X + x
    dtype = x_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
    # What the kernel reaches of the map: it ends at its border.
    for near_y in range(-tl.minimum(REACH_Y, block_y), tl.minimum(REACH_Y, tl.num_programs(1) - 1 - block_y) + 1):
        seen_rows = rows + near_y * BLOCK_Y
        bands_y = bands_y_ptr + (near_y + REACH_Y) * COUNT * BLOCK_Y * BLOCK_Y + y[:, None] * BLOCK_Y + y[None, :]
        for near_x in range(-tl.minimum(REACH_X, block_x), tl.minimum(REACH_X, tl.num_programs(2) - 1 - block_x) + 1):
            seen_columns = columns + near_x * BLOCK_X
            inside = _inside(seen_rows, height)[:, None] & _inside(seen_columns, width)[None, :]
            seen = tl.load(x_ptr + start + seen_rows[:, None] * width + seen_columns[None, :], mask=inside, other=0.0)
            seen = tl.where(is_side, tl.maximum(seen, 0.0), seen).to(dtype)
            bands_x = bands_x_ptr + (REACH_X - near_x) * COUNT * BLOCK_X * BLOCK_X + x[:, None] * BLOCK_X + x[None, :]
            for s in tl.range(COUNT, num_stages=NUM_STAGES):
                band_y = tl.load(bands_y + s * BLOCK_Y * BLOCK_Y)
                band_x = band_y if WHOLE_SQUARE else tl.load(bands_x + s * BLOCK_X * BLOCK_X)
                along_y = tl.dot(band_y, seen, input_precision="tf32x3")
                total = tl.dot(along_y.to(dtype), band_x, total, input_precision="tf32x3")
    inside = _inside(rows, height)[:, None] & _inside(columns, width)[None, :]
    out = out_ptr + start + rows[:, None] * width + columns[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


def gaussian_sum(
    x: Tensor,
    kernel_size: int = 45,
    sigmas: tuple[float, ...] = (1.0, 3.0, 5.0, 7.0, 9.0),
    first_side: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Convolve every channel with the sum of Gaussians K of Eq. 1; the reference is `lgcn_fast.gaussian_sum`.

    Sums are fp32. K is symmetric, so the gradient is the same operation.

    Args:
        x: (B, C, H, W) float32, float16 or bfloat16, on a GPU.
        kernel_size: side of the truncated kernel in pixels, odd.
        sigmas: standard deviations of the Gaussians, in pixels.
        first_side: channels from this one on are the side branch: their ReLU in front of the convolution is computed
            on the way. Not for training.
        out: like `x`, contiguous, any floating-point dtype: where to write the result. Not for training.

    Returns:
        (B, C, H, W), dtype of `x`, or `out`.

    Raises:
        ValueError: another shape or dtype.
    """
    if x.ndim != 4 or x.dtype not in TOLERANCES:
        expected = "(B, C, H, W) float32, float16 or bfloat16"
        raise ValueError(f"x: expected {expected}, got {tuple(x.shape)} {x.dtype}")
    if out is not None and (out.shape != x.shape or not out.is_contiguous()):
        raise ValueError(
            f"out: expected {tuple(x.shape)}, contiguous, got {tuple(out.shape)} of strides {out.stride()}"
        )
    if first_side is not None or out is not None:
        return _launch(x, kernel_size, tuple(sigmas), x.shape[1] if first_side is None else first_side, out)
    return _GaussianSum.apply(x, kernel_size, tuple(sigmas))


@cache  # recorded CUDA graphs read them
def _bands(
    kernel_size: int, sigmas: tuple[float, ...], block: int, reach: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The blocks of the matrices T_s, which depend on how far they lie from the diagonal alone: what a block of the
    result sees of the block `near` further on; kept on the device, since a launch must not wait for a copy.

    Returns:
        (2 * reach + 1, S, block, block), near = -reach to reach; symmetric but for the order of `near`.
    """
    lines = torch.from_numpy(kernel_taps(kernel_size, sigmas, TOLERANCES[dtype]))
    with torch.device("cpu"):  # whatever the default is
        near, row, column = torch.arange(-reach, reach + 1), torch.arange(block), torch.arange(block)
    offset = row[:, None] - (column + near[:, None, None] * block) + kernel_size // 2
    inside = (offset >= 0) & (offset < kernel_size)
    blocks = torch.where(inside, lines[:, offset.clamp(0, kernel_size - 1)], 0.0)
    return blocks.transpose(0, 1).to(device, dtype).contiguous()


def _block(length: int, dtype: torch.dtype) -> int:
    """How many pixels along a side of a map a program computes; 16 are the least for a tensor core."""
    block = max(triton.next_power_of_2(length), 16)
    return block if block <= LARGEST_BLOCK[dtype] else PART[dtype]


def num_warps(block_y: int, block_x: int) -> int:
    """Of a program."""
    return 8 if block_y * block_x > 64 * 64 else 4


def _launch(
    x: Tensor, kernel_size: int, sigmas: tuple[float, ...], first_side: int, out: Tensor | None = None
) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x) if out is None else out
    if not x.numel():
        return out
    batch, channels, height, width = x.shape
    block_y, block_x = (_block(length, x.dtype) for length in (height, width))
    grid = (batch * channels, triton.cdiv(height, block_y), triton.cdiv(width, block_x))
    # Blocks to each side that the kernel reaches, where there are as many.
    reach_y, reach_x = (min(triton.cdiv(kernel_size // 2, block), blocks - 1)
                        for block, blocks in ((block_y, grid[1]), (block_x, grid[2])))  # fmt: skip
    bands_y, bands_x = (_bands(kernel_size, sigmas, block, reach, x.dtype, x.device)
                        for block, reach in ((block_y, reach_y), (block_x, reach_x)))  # fmt: skip
    _gaussian_sum_kernel[grid](
        x, bands_y, bands_x, out, height, width, channels, first_side,
        COUNT=bands_y.shape[1], REACH_Y=reach_y, REACH_X=reach_x, BLOCK_Y=block_y, BLOCK_X=block_x,
        NUM_STAGES=NUM_STAGES, num_warps=num_warps(block_y, block_x), enable_fp_fusion=True,
    )  # fmt: skip
    return out


class _GaussianSum(torch.autograd.Function):
    """`gaussian_sum` for autograd: nothing is saved, the backward pass is the forward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, kernel_size: int, sigmas: tuple[float, ...]) -> Tensor:
        ctx.kernel = kernel_size, sigmas
        return _launch(x, kernel_size, sigmas, x.shape[1])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _launch(gradient, *ctx.kernel, gradient.shape[1]), None, None
